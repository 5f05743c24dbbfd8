# SPDX-License-Identifier: Apache-2.0
"""Rows of files larger than memory: one pass finds where each begins, later reads fetch single rows."""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from cumo.data.formats import Sample, parse_json, parse_row

CHUNK = 1 << 22  # bytes read at once from a JSON list
MAX_ROW = 1 << 28  # bytes; a longer row means a missing quote or bracket that swallows the rest of the file
BOM = b"\xef\xbb\xbf"

# Matches a whole string, so that brackets within are passed over, or the quote of an incomplete string.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[][{}"]', re.DOTALL)
_SEPARATOR = re.compile(rb"\s*,\s*")


class DataFileError(ValueError):
    """A fault of a file that keeps its rows from being told apart."""

    def __init__(self, path: Path, line: int, reason: str) -> None:
        self.path, self.line, self.reason = str(path), line, reason
        super().__init__(f"{path}:{line}: {reason}" if line else f"{path}: {reason}")


class Row(NamedTuple):
    """A row as it is in a file."""

    offset: int
    """Offset of the row's first byte."""
    line: int
    """Line on which the row begins, from 1."""
    raw: bytes


def iterate_rows(path: Path, file: BinaryIO) -> Iterator[Row]:
    """Yield the rows of a .jsonl file (one on each line that is not blank) or of a .json file (which holds a list).

    Raises:
        DataFileError: a .json file is not a list of objects.
    """
    if path.suffix == ".jsonl":
        return _rows_of_lines(file)
    return _ListScanner(path, file).rows()


def _rows_of_lines(file: BinaryIO) -> Iterator[Row]:
    offset = 0
    for line, raw in enumerate(file, start=1):
        start = offset
        offset += len(raw)
        if line == 1 and raw.startswith(BOM):
            start, raw = start + len(BOM), raw[len(BOM) :]
        if raw.strip():
            yield Row(start, line, raw)


class _ListScanner:
    """Finds the elements of a list of any size. Holds one of them and a chunk of the file at a time."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.buffer, self.base = b"", 0  # current bytes, and the file offset of the first
        self.kept = 0  # position in the buffer where the current row, or the text between two rows, begins
        self.line, self.counted = 1, 0  # line number at position `counted` of the buffer
        self.depth = 0
        self.found = 0
        self.ended = False

    def rows(self) -> Iterator[Row]:
        position = 0
        while chunk := self.file.read(CHUNK):
            if not self.base and not self.buffer and chunk.startswith(BOM):
                self.base, chunk = len(BOM), chunk[len(BOM) :]
            self.buffer += chunk
            for match in _TOKEN.finditer(self.buffer, position):
                if match[0] == b'"':
                    position = match.start()
                    break
                position = match.end()
                yield from self._token(match[0], match.start(), match.end())
            position -= self._forget()
        between = self.buffer[self.kept :]
        if not self.ended:
            where = "within a row" if self.depth > 1 else "within the list" if self.depth else "without a list"
            raise self._error(self.kept, f"expected a list of rows, got a file that ends {where}")
        if between.strip():
            raise self._error(self.kept, f"expected nothing after the list, got {between.strip()[:40]!r}")

    def _token(self, token: bytes, start: int, end: int) -> Iterator[Row]:
        """Follow the nesting, and yield the row that ends with this token."""
        if self.depth <= 1:
            self._check_between(token, start)
        if token in b"[{":
            self.depth += 1
            if self.depth == 2:
                self.kept = start
            elif self.depth == 1:
                self.kept = end
        elif token in b"]}":
            self.depth -= 1
            if self.depth == 1:
                self.found += 1
                yield Row(self.base + self.kept, self._line_of(self.kept), self.buffer[self.kept : end])
                self.kept = end
            elif self.depth == 0:
                self.ended, self.kept = True, end

    def _check_between(self, token: bytes, start: int) -> None:
        """Check the text before a token that is not within a row."""
        between = self.buffer[self.kept : start]
        if self.ended:
            raise self._error(start, f"expected nothing after the list, got {token[:40]!r}")
        if self.depth == 0:
            if token != b"[" or between.strip():
                raise self._error(start, "expected a list of rows; a file with a row on each line is to end in .jsonl")
            return
        if token in (b"]", b"}"):
            fits = token == b"]" and not between.strip()
        else:
            fits = token in (b"{", b"[") and bool(_SEPARATOR.fullmatch(between) if self.found else not between.strip())
        if not fits:
            got = (between.strip() + token)[:40]
            raise self._error(start, f"expected objects, with a comma between two, got {got!r} after {self.found}")

    def _forget(self) -> int:
        """Drop the processed part of the buffer, and return its length."""
        if len(self.buffer) - self.kept > MAX_ROW:
            raise self._error(self.kept, f"expected rows of at most {MAX_ROW} bytes; is a quote or bracket missing?")
        dropped = self.kept
        self._line_of(dropped)
        self.buffer, self.base = self.buffer[dropped:], self.base + dropped
        self.kept = self.counted = 0
        return dropped

    def _line_of(self, position: int) -> int:
        """Return the line of a position in the buffer. Positions must not decrease from call to call."""
        self.line += self.buffer.count(b"\n", self.counted, position)
        self.counted = position
        return self.line

    def _error(self, position: int, reason: str) -> DataFileError:
        return DataFileError(self.path, self.line + self.buffer.count(b"\n", self.counted, position), reason)


class RowIndex:
    """Index of a file's rows: 32 bytes of memory for each, whatever its size.

    Args:
        path: a .json or .jsonl file.
        measure: function that estimates the tokens of a sample.
        limit: number of rows after which to stop reading.
        progress: whether to show a bar, if reading takes more than some seconds.

    Attributes:
        path: path of the file.
        offsets, sizes, lines: [rows], int64: first byte, number of bytes, and first line of each row.
        lengths: [rows], int32: result of `measure`; 0 for a bad row.
        image_counts: [rows], int32: number of pictures.
        faults: row -> what is wrong with it.

    Raises:
        DataFileError: `path` does not exist, holds no row, or is not a list of objects.
        OSError: `path` cannot be read.
    """

    def __init__(
        self, path: Path, measure: Callable[[Sample], int], limit: int | None = None, progress: bool = True
    ) -> None:
        if not os.path.isfile(path):
            raise DataFileError(path, 0, "expected a .json or .jsonl file, found none")
        self.path = path
        self.faults: dict[int, str] = {}
        columns = tuple(array(code) for code in "qqqii")
        bar = tqdm(
            total=path.stat().st_size,
            desc=path.name,
            unit="B",
            unit_scale=True,
            delay=3.0,
            leave=False,
            disable=None if progress else True,  # None: shown in a terminal only
        )
        with bar, path.open("rb") as file, closing(iterate_rows(path, file)) as rows:  # type: ignore[type-var]
            for number, row in enumerate(islice(rows, limit)):
                try:
                    sample = parse_row(parse_json(row.raw))
                    length, images = measure(sample), len(sample.images)
                except ValueError as error:
                    self.faults[number] = str(error)
                    length = images = 0
                values = (row.offset, len(row.raw), row.line, length, images)
                for column, value in zip(columns, values, strict=True):
                    column.append(value)
                if number % 1024 == 0:
                    bar.update(row.offset - bar.n)
        self.offsets, self.sizes, self.lines = (np.array(column, dtype=np.int64) for column in columns[:3])
        self.lengths, self.image_counts = (np.array(column, dtype=np.int32) for column in columns[3:])
        if not len(self):
            raise DataFileError(path, 0, "expected rows, got none")

    def __len__(self) -> int:
        return len(self.offsets)

    def read(self, row: int) -> Sample:
        """Read a row. The file is not kept open, so that any process may read.

        Raises:
            ValueError: the row is bad; the message says why.
            OSError: the file cannot be read.
        """
        with self.path.open("rb") as file:
            file.seek(int(self.offsets[row]))
            return parse_row(parse_json(file.read(int(self.sizes[row]))))

    def sample_id(self, row: int) -> object:
        """Return the `id` of a row, even if the row is bad otherwise; None if it has no `id`."""
        with self.path.open("rb") as file:
            file.seek(int(self.offsets[row]))
            try:
                value = parse_json(file.read(int(self.sizes[row])))
            except ValueError:
                return None
        return value.get("id") if isinstance(value, dict) else None
