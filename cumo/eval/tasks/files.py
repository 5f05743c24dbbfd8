# SPDX-License-Identifier: Apache-2.0
"""Reading the benchmarks' files, so that every error names a file and a row."""

from __future__ import annotations

import csv
import glob
import importlib
import json
import os
import sys
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from cumo.data.yaml_text import shown
from cumo.eval.questions import Picture

Key = TypeVar("Key", bound=Hashable)

# What pandas, through which the published scripts read tables, takes for an empty cell.
_EMPTY = "|#N/A|#N/A N/A|#NA|-1.#IND|-1.#QNAN|-NaN|-nan|1.#IND|1.#QNAN|<NA>|N/A|NA|NULL|NaN|None|n/a|nan|null"


def is_empty(cell: str) -> bool:
    """Whether the cell of a table counts as empty."""
    return cell in _EMPTY.split("|") or cell.lower() in ("nan", "none")


class Row(NamedTuple):
    """An object of a file, and where it stands."""

    values: Mapping[str, Any]
    source: str

    def get(self, key: str, *types: type) -> Any:
        """The value of `key`.

        Raises:
            ValueError: there is none, or it is of none of `types`.
        """
        value = self.values.get(key)
        if value is None:
            raise ValueError(f"{self.source}: expected a value of {key}, got none")
        if types and not isinstance(value, types):
            expected = " or ".join(kind.__name__ for kind in types)
            raise ValueError(f"{self.source}: {key}: expected {expected}, got {shown(value)}")
        return value

    def text(self, key: str) -> str:
        """The text of `key`, which must not be empty.

        Raises:
            ValueError: it is, or is no text.
        """
        value = self.get(key, str)
        if not value.strip():
            raise ValueError(f"{self.source}: {key}: expected text, got {shown(value)}")
        return str(value)

    def cell(self, key: str) -> str | None:
        """The cell of a table, None where it is empty.

        Raises:
            ValueError: the table has no such column.
        """
        if key not in self.values:
            raise ValueError(f"{self.source}: expected a column {key}, got {sorted(self.values)}")
        value = self.values[key]
        return None if is_empty(value) else value

    def picture(self, key: str, folder: Path) -> Picture:
        """The picture whose path below `folder` stands in `key`.

        Raises:
            ValueError: no path, or none of a file.
        """
        name = self.text(key)
        path = folder / name
        if not os.path.isfile(path):
            raise ValueError(f"{self.source}: {key}: expected a picture {str(path)[:500]}, found none")
        return Picture(name, path)


def existing(path: Path) -> Path:
    """The path.

    Raises:
        ValueError: there is no such file.
    """
    if not path.is_file():
        raise ValueError(f"{path}: expected a file of the benchmark, found none")
    return path


def _parse(text: str, source: str) -> Any:
    try:
        content = json.loads(text)
        json.dumps(content, ensure_ascii=False).encode()  # halves of characters cannot be written again
        return content
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: expected JSON, got {error}") from error


def read_text(path: Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        ValueError: it is something else, or absent.
    """
    try:
        return existing(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got {error}") from error


def read_json(path: Path, kind: type = dict) -> Any:
    """A JSON file that holds a `kind`.

    Raises:
        ValueError: it does not, or is absent.
    """
    content = _parse(read_text(path), str(path))
    if not isinstance(content, kind):
        raise ValueError(f"{path}: expected a JSON {kind.__name__}, got {type(content).__name__}")
    return content


def _row(values: Any, source: str) -> Row:
    if not isinstance(values, dict):
        raise ValueError(f"{source}: expected an object, got {shown(values)}")
    return Row(values, source)


def read_rows(path: Path) -> list[Row]:
    """Objects of a JSONL file, or of a JSON file with a list of them.

    Raises:
        ValueError: it holds something else, or none, or is absent.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        content = enumerate(_parse(text, str(path)), start=1)
        rows = [_row(values, f"{path}: entry {number}") for number, values in content]
    else:
        lines = [(f"{path}: line {number}", line) for number, line in enumerate(text.split("\n"), start=1)]
        rows = [_row(_parse(line, source), source) for source, line in lines if line.strip()]
    if not rows:
        raise ValueError(f"{path}: expected rows, found none")
    return rows


def read_entries(path: Path, content: Mapping[str, Any]) -> dict[str, Row]:
    """Objects by key of a JSON object that was read from `path`.

    Raises:
        ValueError: a value is no object, or there are none.
    """
    if not content:
        raise ValueError(f"{path}: expected entries, found none")
    return {key: _row(values, f"{path}: entry {key[:200]}") for key, values in content.items()}


def read_table(path: Path) -> list[Row]:
    """Rows of a tab-separated table with a header, whose cells may hold whole pictures.

    Raises:
        ValueError: a row has more or fewer cells than the header, or there is none.
    """
    csv.field_size_limit(sys.maxsize)  # a picture in base64 is longer than the default allows
    with existing(path).open(encoding="utf-8", newline="") as file:
        try:
            table = [(reader.line_num, cells) for reader in [csv.reader(file, delimiter="\t")] for cells in reader]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: expected a tab-separated table in UTF-8, got {error}") from error
    if len(table) < 2:
        raise ValueError(f"{path}: expected a header and rows, found {len(table)} lines")
    header = table[0][1]
    for number, cells in table[1:]:
        if len(cells) != len(header):
            raise ValueError(f"{path}: line {number}: expected {len(header)} cells, got {len(cells)}")
    return [Row(dict(zip(header, cells, strict=True)), f"{path}: line {number}") for number, cells in table[1:]]


def read_parquet(pattern: Path) -> list[Row]:
    """Rows of the Parquet files that `pattern` names, in the order of their names. Needs pyarrow.

    Raises:
        ValueError: there are none, or pyarrow is missing.
    """
    paths = [Path(name) for name in sorted(glob.glob(str(pattern)))]
    if not paths:
        raise ValueError(f"{pattern}: expected Parquet files of the benchmark, found none")
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ValueError(f"{paths[0]}: expected pyarrow to be installed, which reads Parquet files") from error
    rows = []
    for path in paths:
        try:
            values = parquet.read_table(path).to_pylist()
        except (ValueError, OSError) as error:
            raise ValueError(f"{path}: expected a Parquet file, got {error}") from error
        rows += [Row(row, f"{path}: row {number}") for number, row in enumerate(values, start=1)]
    return rows


def unique(keys: Iterable[tuple[Key, str]], what: str) -> None:
    """Check that no key occurs twice.

    Args:
        keys: (key, source).
        what: the key's name, for the error.

    Raises:
        ValueError: one does.
    """
    seen: dict[Key, str] = {}
    for key, source in keys:
        if key in seen:
            raise ValueError(f"{source}: {what}: expected one that is new, got {shown(key)}, which {seen[key]} has")
        seen[key] = source


def same_keys(asked: Mapping[Key, str], known: Mapping[Key, str], what: str) -> None:
    """Check that two files are about the same questions.

    Args:
        asked: source of each question.
        known: source of each reference.
        what: the key's name, for the error.

    Raises:
        ValueError: a question has no reference, or the other way round.
    """
    for these, those, missing in ((asked, known, "a reference"), (known, asked, "a question")):
        for key, source in these.items():
            if key not in those:
                raise ValueError(f"{source}: expected {missing} of {what} {shown(key)}, found none")
