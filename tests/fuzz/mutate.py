# SPDX-License-Identifier: Apache-2.0
"""Valid things made invalid, at random but by structure: values of JSON, bytes of files."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from random import Random
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings

# All choices of a case come out of this; Hypothesis makes them smaller once a case fails.
RANDOM = st.randoms(use_true_random=False)


def cases(share: float = 1.0) -> settings:
    """A share of the examples that the profile asks for; nothing about a case may depend on those before it."""
    most = max(1, round(settings.default.max_examples * share))
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    return settings(max_examples=most, suppress_health_check=checks)


def _nested(depth: int, leaf: Any = None) -> Any:
    value = leaf
    for index in range(depth):
        value = [value] if index % 2 else {"a": value}
    return value


NUMBERS = (0, 1, -1, 2, 3, 7, 100, 2**31 - 1, 2**31, 2**63, -(2**63) - 1, 10**300, 0.5, -0.0, 1e-300, 1e308, 2.0)
NO_NUMBERS = (float("nan"), float("inf"), -float("inf"))
TEXTS = (
    "",
    " ",
    "\0",
    "a\0b",
    "\ud800",
    "\udfff half",
    "\ufeff",
    "\ufdd0\uffff",
    "é\u0301 \U0001f600 \u202e",
    "1",
    "-1",
    "nan",
    "true",
    "null",
    "..",
    "/",
    "../../../../etc/passwd",
    "C:\\x",
    "a b/ç.png",
    "<image>",
    "</s><s>[INST]",
    "%s {0} {x}",
    "__class__",
    "data:image/png;base64,",
    "\r\n\t\v",
    "x" * 300,
    "y" * 100_000,
)
HOSTILE = (
    None,
    True,
    False,
    *NUMBERS,
    *NO_NUMBERS,
    *TEXTS,
    [],
    {},
    [None],
    [[]],
    [1, "a"],
    {"": None},
    {"a": 1},
    {"type": 3},
    [{}],
    _nested(60),
    [0] * 3000,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values within a value, its own included."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from places(entry, (*path, index))


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        value = value[step]
    return value


def mutated(value: Any, random: Random, hostile: tuple[Any, ...] = HOSTILE, most: int = 2) -> Any:
    """A copy of a value of JSON with up to `most` places replaced, deleted, renamed, doubled, wrapped or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(random.randint(1, most)):
        found = list(places(value))
        path = found[random.randrange(len(found))]
        replacement = copy.deepcopy(hostile[random.randrange(len(hostile))])
        if not path:
            return replacement if random.randrange(4) == 0 else value
        owner, last = _at(value, path[:-1]), path[-1]
        kind = random.randrange(9)
        if kind <= 3:
            owner[last] = replacement
        elif kind == 4:
            del owner[last]
        elif kind == 5 and isinstance(owner, dict):
            owner[random.choice([str(last).upper(), f"{last} ", "\ud800", "", "__init__", "x"])] = owner.pop(last)
        elif kind == 5:
            owner.insert(random.randrange(len(owner) + 1), copy.deepcopy(owner[last]))
        elif kind == 6:
            owner[last] = [owner[last]] if random.randrange(2) else {"value": owner[last]}
        elif kind == 7:
            owner[last] = copy.deepcopy(_at(value, found[random.randrange(len(found))]))
        else:
            owner[last] = _retyped(owner[last], random)
    return value


def _retyped(value: Any, random: Random) -> Any:
    """Something near a value, of another type or size."""
    if isinstance(value, bool) or value is None:
        return random.choice([int(bool(value)), str(value), not value])
    if isinstance(value, (int, float)):
        return random.choice([str(value), -value, value + 1, value * 2, float(value), [value]])
    if isinstance(value, str):
        return random.choice([value + "\ud800", value[:-1], value * 50, value.encode().hex(), [value], {value: value}])
    return random.choice([str(value)[:200], list(value), len(value)])


def as_json(value: Any, random: Random, on_one_line: bool = False) -> bytes:
    """The text of a value, NaN and all; every fourth is not quite JSON or not quite UTF-8."""
    indent = None if on_one_line else random.choice([None, 1])
    text = json.dumps(value, ensure_ascii=bool(random.randrange(2)), indent=indent)
    raw = text.encode("utf-8", "surrogatepass")
    if random.randrange(4):
        return raw
    kind = random.randrange(10)
    if kind == 0:
        return b"\xef\xbb\xbf" + raw
    if kind == 1:
        return raw.replace(b"\n", b"\r\n").replace(b" ", b"\t")
    if kind == 2:
        return text.encode("utf-16", "surrogatepass")
    if kind == 3:
        return raw.replace(b"a", b"\xe9", 1)
    if kind == 4:
        return b"[" * 20_000 + raw
    if kind == 5:
        return raw.replace(b":", b':{"a":' * 5_000, 1)
    if kind == 6:
        return raw.replace(b"{", b'{"id": 1, "id": "2", ', 1)
    if kind == 7:
        return raw.replace(b"1", b"1" * 5_000, 1)
    return damaged(raw, random)


def damaged(raw: bytes, random: Random) -> bytes:
    """Bytes cut off, flipped, taken out, put in, doubled or zeroed; sometimes none are left."""
    for _ in range(random.randint(1, 3)):
        kind, size = random.randrange(8), len(raw)
        at = random.randrange(size + 1)
        end = min(size, at + random.choice([1, 2, 4, 8, 64, 1000]))
        if kind == 0:
            raw = raw[:at]
        elif kind <= 3 and at < size:
            raw = raw[:at] + bytes([raw[at] ^ (1 << random.randrange(8))]) + raw[at + 1 :]
        elif kind == 4:
            raw = raw[:at] + raw[end:]
        elif kind == 5:
            raw = raw[:at] + random.choice([b"\0", b"\xff" * 8, b"\n", b"\x80", b"{", b'"']) + raw[at:]
        elif kind == 6:
            raw = raw[:end] + raw[at:]
        else:
            raw = raw[:at] + bytes(end - at) + raw[end:]
    return raw if random.randrange(40) else b""
