# SPDX-License-Identifier: Apache-2.0
"""Tables of the tiles that `python -m cumo_kernels.tune` found on a card: JSON files, read once.

The package has one, `tuned_tiles.json` beside this file. The environment variable CUMO_TUNED_TILES names another, whose
entries take precedence. Without an entry, `cumo_kernels.tiling` chooses.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

SHIPPED = Path(__file__).with_name("tuned_tiles.json")
VARIABLE = "CUMO_TUNED_TILES"
# A step holds every number up to the one given and above the one before, so that a tile serves sizes near those it
# was tuned for. A new batch size rarely leaves its step of rows.
ROWS = (16, 64, 512)
REDUCTIONS = (512, 1024, 2048, 4096, 8192)
EXPERTS = (8, 64)
MANY = "more"


class Key(NamedTuple):
    """Which GEMMs share a tile."""

    arch: int
    """Compute capability: 90 for sm_90."""
    dtype: str
    """bfloat16, float16 or float32."""
    kind: str
    """As of `cumo_kernels.tiling.gemm_tile`."""
    n: int
    """Output width: exact, for it decides how evenly the tiles fill the device."""
    k: str
    """Step in `REDUCTIONS` of the width that is summed over; of a "wgrad", which sums over rows, the other width."""
    transposed: bool
    """Whether the weight is contiguous along n, as in a backward pass."""
    experts: str
    """Step in `EXPERTS`."""
    rows: str
    """Step in `ROWS` of the mean number of rows per expert."""


def step_of(number: float, steps: tuple[int, ...]) -> str:
    """The step that contains `number`: the least of `steps` that is not below it, or "more"."""
    for step in steps:
        if number <= step:
            return str(step)
    return MANY


def make_key(
    arch: int, dtype: torch.dtype, kind: str, rows: int, num_experts: int, n: int, k: int, transposed: bool
) -> Key:
    """The key of a GEMM of `rows` rows; the other arguments as in `Key`, but exact."""
    name, per_expert = str(dtype).removeprefix("torch."), rows / num_experts
    steps = step_of(k, REDUCTIONS), transposed, step_of(num_experts, EXPERTS), step_of(per_expert, ROWS)
    return Key(arch, name, kind, n, *steps)


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The entries of a table: each has the fields of `Key`, a `tile`, and fields that say where it is from.

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
    """For each key, the fields of its tile, from the shipped table and that of CUMO_TUNED_TILES.

    Raises:
        ValueError: a file is not such a table.
    """
    paths = [SHIPPED] if SHIPPED.is_file() else []
    if os.environ.get(VARIABLE):
        paths.append(Path(os.environ[VARIABLE]))
    return {key_of(entry): dict(entry["tile"]) for path in paths for entry in read_entries(path)}
