# SPDX-License-Identifier: Apache-2.0
"""A server that runs for long: garbage is collected soon, and free memory goes back to the system."""

from __future__ import annotations

import asyncio
import ctypes
import gc
from collections.abc import Callable

SECONDS = 5.0


def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library
        return None


def settle() -> None:
    """To be called once everything is loaded that stays for good.

    Python looks for garbage among old objects only once their number has grown by a quarter. The libraries alone are
    half a million objects, beside which errors, with the frames and request bodies that they hold on to in cycles, pile
    up to tens of MiB. What is frozen does not count.
    """
    gc.collect()
    gc.freeze()
    gc.collect()  # counts the old objects anew, without the frozen ones


async def give_back() -> None:
    """Collect garbage and hand free memory back, every few seconds, until it is cancelled.

    Large bodies and pictures come and go in many threads, and glibc keeps the holes that they leave.
    """
    trim = _trim()
    while True:
        await asyncio.sleep(SECONDS)
        if gc.get_freeze_count():  # otherwise it would take a while, in which nothing else runs
            gc.collect()
        if trim is not None:
            await asyncio.to_thread(trim, 0)
