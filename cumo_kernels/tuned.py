# SPDX-License-Identifier: Apache-2.0
"""Tiles that `python -m cumo_kernels.tune` found on a card: a table in a JSON file, read once.

The table of the package is `tuned_tiles.json` beside this file. The environment variable CUMO_TUNED_TILES names a
further one, whose entries come first. Where neither has an entry, `cumo_kernels.tiling` chooses.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

SHIPPED = Path(__file__).with_name("tuned_tiles.json")
VARIABLE = "CUMO_TUNED_TILES"
# Largest number of rows per expert of each step; a new batch size rarely leaves its step.
STEPS = (16, 64, 512)
MANY = "more"


class Key(NamedTuple):
    """What a tile is tuned for."""

    arch: int
    """Compute capability: 90 for sm_90."""
    dtype: str
    """bfloat16, float16 or float32."""
    kind: str
    """As of `cumo_kernels.tiling.gemm_tile`."""
    n: int
    """Output width."""
    rows: str
    """Rows per expert: up to "16", "64", "512", or "more"."""


def step_of(rows_per_expert: float) -> str:
    """The step that a number of rows falls into."""
    return next((str(step) for step in STEPS if rows_per_expert <= step), MANY)


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The entries of a table: each with the fields of `Key`, a `tile`, and whatever says where it is from.

    Raises:
        ValueError: the file is not such a table.
    """
    try:
        entries = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected a table of tuned tiles, got {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a list, got {type(entries).__name__}")
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict) or not {*Key._fields, "tile"} <= entry.keys():
            raise ValueError(f"{path}: entry {index}: expected the keys {[*Key._fields, 'tile']}, got {entry!r}")
    return entries


def key_of(entry: Mapping[str, Any]) -> Key:
    """The key of an entry."""
    return Key(*(entry[name] for name in Key._fields))


def read_tables() -> dict[Key, dict[str, Any]]:
    """Fields of the tile for each key, of the shipped table and that of CUMO_TUNED_TILES.

    Raises:
        ValueError: a file is not such a table.
    """
    paths = [SHIPPED] if SHIPPED.is_file() else []
    if os.environ.get(VARIABLE):
        paths.append(Path(os.environ[VARIABLE]))
    return {key_of(entry): dict(entry["tile"]) for path in paths for entry in read_entries(path)}
