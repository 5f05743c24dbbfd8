# SPDX-License-Identifier: Apache-2.0
"""Choose the rows to train on: those of one file, or of a mixture in the format of LLaVA-NeXT."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cumo.data.yaml_text import parse_yaml, shown

SUFFIXES = (".json", ".jsonl")
MAX_WEIGHT = 1000  # the row numbers of an epoch are in memory
_SAMPLING = re.compile(r"all|(?P<which>first|end|random):(?P<amount>\d+|\d+(?:\.\d+)?%)")
_KEYS = {"json_path": "path", "image_folder": "image_folder", "sampling_strategy": "sampling", "weight": "weight"}


@dataclass(frozen=True)
class DataSource:
    """A file of conversations, and which of its rows to use.

    Raises:
        ValueError: a field has an invalid value.
    """

    path: str
    """A .json file, which holds a list of rows, or a .jsonl file, with a row on each line."""
    image_folder: str = ""
    """Folder that the paths of pictures are relative to; by default the file's own."""
    sampling: str = "all"
    """Rows to use: all, or first:N, end:N or random:N, in the order of the file; N% for a share, rounded up."""
    weight: float = 1.0
    """Passes over the rows in an epoch: 2 is twice, 0.5 is a random half of them; at most 1000."""

    def __post_init__(self) -> None:
        for name in ("path", "image_folder"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name}: expected a string, got {shown(getattr(self, name))}")
        if Path(self.path).suffix not in SUFFIXES:
            raise ValueError(f"path: expected a file that ends in .json or .jsonl, got {shown(self.path)}")
        found = _SAMPLING.fullmatch(self.sampling) if isinstance(self.sampling, str) else None
        if found is None or (found["which"] and not self._in_range(found["amount"])):
            raise ValueError(
                "sampling: expected all, first:N, end:N or random:N, where N is at least 1 or a share in percent, "
                f"got {shown(self.sampling)}"
            )
        number = isinstance(self.weight, (int, float)) and not isinstance(self.weight, bool)
        if not number or not self.weight > 0:
            raise ValueError(f"weight: expected a positive number, got {shown(self.weight)}")
        if self.weight > MAX_WEIGHT:
            raise ValueError(f"weight: expected up to {MAX_WEIGHT}, got {shown(self.weight)}")

    @staticmethod
    def _in_range(amount: str) -> bool:
        return 0 < float(amount[:-1]) <= 100 if amount.endswith("%") else int(amount) > 0

    @property
    def folder(self) -> Path:
        """Folder that the paths of pictures are relative to."""
        return Path(self.image_folder) if self.image_folder else Path(self.path).parent

    @property
    def limit(self) -> int | None:
        """Number of rows of the file that must be read; None for all."""
        kind, _, amount = self.sampling.partition(":")
        return int(amount) if kind == "first" and not amount.endswith("%") else None

    def select(self, rows: int, rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the numbers of an epoch's rows, for a file of `rows` rows. A row appears once for each pass over it.

        Raises:
            ValueError: `sampling` asks for more rows than there are.
        """
        kind, _, amount = self.sampling.partition(":")
        count = rows
        if amount.endswith("%"):
            count = math.ceil(rows * float(amount[:-1]) / 100)
        elif amount:
            count = int(amount)
        if count > rows:
            raise ValueError(f"{self.path}: expected at least {count} rows for sampling {self.sampling!r}, got {rows}")
        if kind == "random":
            taken = np.sort(rng.permutation(rows)[:count])
        else:
            taken = np.arange(rows)[rows - count if kind == "end" else 0 :][:count]
        passes, share = divmod(self.weight, 1)
        part = np.sort(rng.permutation(taken)[: round(share * count)])
        return np.concatenate([*[taken] * int(passes), part]).astype(np.int64)


def read_sources(path: str | Path) -> list[DataSource]:
    """Read the sources from a data file or a mixture.

    Args:
        path: a .json or .jsonl file, or a .yaml file in the format of LLaVA-NeXT:
            `datasets: [{json_path, sampling_strategy, image_folder, weight}, ...]`, all but the first optional (see
            `DataSource`). Relative paths in it are relative to it. Reading it needs PyYAML.

    Raises:
        ValueError: the mixture is invalid; the message names it and the entry.
        OSError: `path` cannot be read.
    """
    path = Path(path)
    if path.suffix in SUFFIXES:
        return [DataSource(str(path))]
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"path: expected a .json, .jsonl or .yaml file, got {str(path)!r}")
    mixture = parse_yaml(path.read_bytes(), str(path))
    entries = mixture.get("datasets") if isinstance(mixture, dict) else None
    if not isinstance(entries, list) or not entries or set(mixture) != {"datasets"}:
        raise ValueError(f"{path}: expected a list under datasets and nothing else")
    sources = []
    for index, entry in enumerate(entries):
        where = f"{path}: datasets[{index}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("json_path"), str):
            raise ValueError(f"{where}: expected json_path and what to take of it, got {shown(entry)}")
        if unknown := set(entry) - set(_KEYS):
            raise ValueError(f"{where}: expected keys of {list(_KEYS)}, got {shown(sorted(map(str, unknown)))}")
        fields = {_KEYS[key]: value for key, value in entry.items() if value is not None}
        for name in ("path", "image_folder"):
            if isinstance(fields.get(name), str) and fields[name]:
                fields[name] = str(path.parent / fields[name])
        try:
            sources.append(DataSource(**fields))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return sources
