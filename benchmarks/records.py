# SPDX-License-Identifier: Apache-2.0
"""Rows of results: each names the machine, the versions and the commit with which it was measured."""

from __future__ import annotations

import csv
import json
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("triton", "transformers")

Row = dict[str, Any]


def device_name(device: torch.device) -> str:
    """The name of the card, or the kind of CPU and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


@cache
def commit() -> str:
    """The commit of the checkout, with a "+" if files have changed since; empty without a checkout."""
    try:
        name = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no", "--", "cumo", "cumo_kernels", "benchmarks/*.py"],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
    except FileNotFoundError:
        return ""
    return name.stdout.strip() + ("+" if changed.stdout.strip() else "") if name.returncode == 0 else ""


def environment(device: torch.device) -> Row:
    """The first columns of every row."""
    return {
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "device": device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: _version(package) for package in PACKAGES},
    }


def slug(text: str) -> str:
    """A name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


class Writer:
    """Appends each row to a CSV file at once, so that an interrupted run keeps what it has measured.

    Args:
        path: of the file. If it exists with other columns, a number is added to the name.
    """

    def __init__(self, path: Path) -> None:
        self._wanted = path
        self.path = path
        self.rows: list[Row] = []

    def write(self, row: Row) -> None:
        """Append a row, which has the keys of the first."""
        if not self.rows:
            self.path = self._free(list(row))
        new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)
        self.rows.append(row)

    def _free(self, columns: list[str]) -> Path:
        path, number = self._wanted, 1
        while path.exists() and path.read_text().splitlines()[:1] != [",".join(columns)]:
            number += 1
            path = self._wanted.with_name(f"{self._wanted.stem}-{number}{self._wanted.suffix}")
        return path

    def write_json(self) -> Path:
        """Write the rows of this run beside the CSV file, in place of those of an earlier run; returns the path."""
        path = self.path.with_suffix(".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.rows, indent=1) + "\n")
        return path


def table(rows: Iterable[Mapping[str, str]], right: Iterable[str] = ()) -> str:
    """Format rows of text as aligned columns below their names."""
    listed = list(rows)
    if not listed:
        return ""
    names, right = list(listed[0]), set(right)
    width = {name: max(len(name), *(len(row[name]) for row in listed)) for name in names}
    lines = [{name: name for name in names}, *listed]
    return "\n".join(
        "  ".join(row[n].rjust(width[n]) if n in right else row[n].ljust(width[n]) for n in names).rstrip()
        for row in lines
    )
