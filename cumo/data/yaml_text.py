# SPDX-License-Identifier: Apache-2.0
"""Parse YAML from people: plain values, each key once, of a size that its text accounts for. Needs PyYAML."""

from __future__ import annotations

import reprlib
from typing import Any

MAX_VALUES = 100_000
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200


def shown(value: object) -> str:
    """Shorten a value for an error message."""
    return _SHORT.repr(value)


def parse_yaml(raw: str | bytes, name: str, expected: str = "YAML") -> Any:
    """Parse a YAML text.

    Args:
        raw: the text; bytes are UTF-8 (or UTF-16 with its mark).
        name: name of the text in error messages.
        expected: what error messages say was expected.

    Raises:
        ValueError: `raw` is not YAML, or holds other than plain values; a mapping has a key twice, so that one value
            would be lost; or references make it endless, or larger than `MAX_VALUES`.
    """
    import yaml

    try:
        value = yaml.load(raw, _loader())
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: expected {expected}, got {str(error)[:1000]}") from error
    except RecursionError as error:
        raise ValueError(f"{name}: expected {expected} that can be read, got what is nested too deep") from error
    except Exception as error:  # PyYAML raises any error on a value that does not fit its tag
        raise ValueError(f"{name}: expected {expected}, got a value that is none: {str(error)[:1000]}") from error
    if _size(value) > MAX_VALUES:
        raise ValueError(f"{name}: expected up to {MAX_VALUES} values, got more, by references within references")
    return value


def _loader() -> Any:
    """Return PyYAML's safe loader, changed to accept each key once."""
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
    """Count the values, each as often as it is referred to, but no further than needed."""
    count, left = 0, [value]
    while left and count <= MAX_VALUES:
        count += 1
        inner = left.pop()
        if isinstance(inner, dict):
            left += [*inner.keys(), *inner.values()]
        elif isinstance(inner, (list, tuple, set)):
            left += inner
    return count
