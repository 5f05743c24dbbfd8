# SPDX-License-Identifier: Apache-2.0
"""Files of one JSON object a line that grow while a program runs, and survive that it is killed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cumo.data.yaml_text import shown


def _parse(line: bytes, source: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode()  # halves of characters cannot be written again
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: expected JSON, got {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{source}: expected an object, got {shown(record)}")
    return record


def _is_cut_off(line: bytes) -> bool:
    """Whether the last line, which has no newline, was cut off."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return False


def read_records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(source, object) of each line, but not of a last one that was cut off.

    Raises:
        ValueError: another line is no JSON object.
    """
    *lines, last = path.read_bytes().split(b"\n")
    if last and not _is_cut_off(last):
        lines.append(last)
    numbered = ((f"{path}: line {number}", line) for number, line in enumerate(lines, start=1))
    return [(source, _parse(line, source)) for source, line in numbered if line.strip()]


def append_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Add objects, one a line, on the disk when this returns; a last line that was cut off gives way to them."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    with path.open("ab+") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(0)
            last = file.read().rsplit(b"\n", 1)[-1]
            if last and _is_cut_off(last):
                file.truncate(end - len(last))
            elif last:
                text = "\n" + text
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
