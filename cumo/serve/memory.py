# SPDX-License-Identifier: Apache-2.0
"""Free memory goes back to the system.

Large bodies and pictures come and go in many threads, and glibc keeps the holes that they leave, a few MiB more every
minute, though nothing is lost: of what a busy server held, as much was free as in use.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable

SECONDS = 5.0


def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library
        return None


async def give_back() -> None:
    """Every few seconds, until it is cancelled; nothing where the C library has no such call."""
    trim = _trim()
    while trim is not None:
        await asyncio.sleep(SECONDS)
        await asyncio.to_thread(trim, 0)
