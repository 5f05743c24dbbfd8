# SPDX-License-Identifier: Apache-2.0
"""YAML that somebody wrote: plain values, each key once, of a size that its text accounts for. Needs PyYAML."""

from __future__ import annotations

import reprlib
from typing import Any

MAX_VALUES = 100_000
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200


def shown(value: object) -> str:
    """A value for an error's message, however large it is."""
    return _SHORT.repr(value)


def parse_yaml(raw: str | bytes, name: str, expected: str = "YAML") -> Any:
    """The value of a YAML text.

    Args:
        raw: the text, in bytes UTF-8 (or UTF-16 with its mark).
        name: what errors call it.
        expected: what errors say was expected.

    Raises:
        ValueError: it is no YAML, or not of plain values; a mapping has a key twice, of which one would be lost; or
            references make it endless, or larger than `MAX_VALUES`.
    """
    import yaml

    try:
        value = yaml.load(raw, _loader())
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: expected {expected}, got {str(error)[:1000]}") from error
    except RecursionError as error:
        raise ValueError(f"{name}: expected {expected} that can be read, got what is nested too deep") from error
    except Exception as error:  # PyYAML raises whatever a value that is none of its tag leads it to
        raise ValueError(f"{name}: expected {expected}, got a value that is none: {str(error)[:1000]}") from error
    if _size(value) > MAX_VALUES:
        raise ValueError(f"{name}: expected up to {MAX_VALUES} values, got more, by references within references")
    return value


def _loader() -> Any:
    """PyYAML's safe loader, which takes each key once."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                if key_node.tag == "tag:yaml.org,2002:merge" or not isinstance(key_node, yaml.ScalarNode):
                    continue
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key_node.value!r} for the second time", key_node.start_mark
                    )
                seen.add(key_node.value)
            return super().construct_mapping(node, deep)

    return Loader


def _size(value: Any) -> int:
    """How many values there are, each as often as it is referred to; counts no further than needed."""
    count, left = 0, [value]
    while left and count <= MAX_VALUES:
        count += 1
        inner = left.pop()
        if isinstance(inner, dict):
            left += [*inner.keys(), *inner.values()]
        elif isinstance(inner, (list, tuple, set)):
            left += inner
    return count
