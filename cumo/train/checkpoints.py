# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are there whole or not at all.

`checkpoint-N` is written aside, as `.checkpoint-N.incomplete`, flushed to the disk, listed in a manifest, and renamed.
Whatever interrupts that, the checkpoints under their own names are whole. One whose files are no longer those of its
manifest is not gone on from, nor counted when old ones are removed.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_ASIDE = re.compile(r"\.checkpoint-\d+\.(incomplete|removed)")


class CheckpointError(OSError):
    """A checkpoint could not be written."""


def name_of(step: int) -> str:
    """The folder's name."""
    return f"checkpoint-{step}"


def aside_of(folder: Path, step: int) -> Path:
    """Folder in which the checkpoint of a step is written, before it is renamed."""
    return folder / f".{name_of(step)}.incomplete"


def step_of(checkpoint: Path) -> int:
    """The step at which it was written."""
    return int(checkpoint.name.rpartition("-")[2])


def flush(path: Path) -> None:
    """Have the disk hold a file or the entries of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(aside: Path, folder: Path, step: int) -> Path:
    """Give a checkpoint that was written aside its name; returns where it is.

    Raises:
        OSError: the disk does not take it.
    """
    files = sorted(path for path in aside.rglob("*") if path.is_file())
    listed = {path.relative_to(aside).as_posix(): path.stat().st_size for path in files}
    (aside / MANIFEST).write_text(json.dumps({"step": step, "files": listed}, indent=1) + "\n")
    for path in (*files, aside / MANIFEST, *(path for path in aside.rglob("*") if path.is_dir()), aside):
        flush(path)
    target = folder / name_of(step)
    if target.exists():  # an incomplete one, as no step is done twice after a complete one
        _remove(target)
    aside.rename(target)
    flush(folder)
    return target


def fault_of(checkpoint: Path) -> str | None:
    """Describe what a checkpoint lacks; None if it is whole."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        files: dict[str, int] = dict(manifest["files"])
        if manifest["step"] != step_of(checkpoint):
            return f"{MANIFEST} is that of step {manifest['step']}"
    except FileNotFoundError:
        return f"there is no {MANIFEST}"
    except (ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} is damaged: {error!r}"
    for name, size in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} of {size} bytes"
    return None


def complete(folder: Path) -> list[Path]:
    """The whole checkpoints of a folder, oldest first; of others a warning says what they lack."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if _NAME.fullmatch(path.name) and path.is_dir():
            fault = fault_of(path)
            if fault is None:
                found.append(path)
            else:
                logger.warning("%s: left out, since it is incomplete: %s", path, fault)
    return sorted(found, key=step_of)


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a folder."""
    return next(reversed(complete(folder)), None)


def rotate(folder: Path, limit: int) -> None:
    """Remove all whole checkpoints but the `limit` newest."""
    for checkpoint in complete(folder)[:-limit]:
        _remove(checkpoint)


def tidy(folder: Path) -> None:
    """Remove what interrupted processes left aside."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _ASIDE.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _remove(checkpoint: Path) -> None:
    """Take its name away first: what is removed in part must not look whole."""
    aside = checkpoint.with_name(f".{checkpoint.name}.removed")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)
