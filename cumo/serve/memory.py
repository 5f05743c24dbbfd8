# SPDX-License-Identifier: Apache-2.0
"""Memory of a long-running server: collect garbage early, and return free memory to the system."""

from __future__ import annotations

import asyncio
import ctypes
import gc
from collections.abc import Callable

SECONDS = 5.0
_FROZEN_AT_START = gc.get_freeze_count()  # Python 3.12 freezes some objects itself


def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # not glibc
        return None


def settle() -> None:
    """Freeze the objects loaded so far, so that garbage collection skips them. Call it once all is loaded.

    Python looks for garbage among old objects only after their number has grown by a quarter. The libraries alone
    create half a million objects. Beside them errors, whose reference cycles hold frames and request bodies, pile up to
    tens of MiB before they are collected. Frozen objects do not count.
    """
    gc.collect()
    gc.freeze()
    gc.collect()  # resets the count of old objects, now without the frozen ones


async def give_back() -> None:
    """Collect garbage and return free memory to the system every few seconds, until cancelled.

    Large bodies and pictures come and go in many threads, and glibc keeps the holes that they leave.
    """
    trim = _trim()
    while True:
        await asyncio.sleep(SECONDS)
        if gc.get_freeze_count() > _FROZEN_AT_START:  # otherwise it takes long, and nothing else runs meanwhile
            gc.collect()
        if trim is not None:
            await asyncio.to_thread(trim, 0)
