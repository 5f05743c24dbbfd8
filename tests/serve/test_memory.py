# SPDX-License-Identifier: Apache-2.0
"""Garbage in cycles, as errors leave it, goes soon, and not only once there is as much as a quarter of all objects."""

import asyncio
import gc
import weakref

import pytest

from cumo.serve import memory


class Node:
    """Holds on to itself."""

    def __init__(self):
        self.me = self


@pytest.fixture
def unfrozen():
    """The collector as it was."""
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("unfrozen")
@pytest.mark.parametrize("settled", [True, False])
def test_garbage_in_cycles(monkeypatch, settled):
    monkeypatch.setattr(memory, "SECONDS", 0.01)
    if settled:
        memory.settle()
        assert gc.get_freeze_count() > 100_000
    gc.collect()
    gc.disable()
    node = weakref.ref(Node())
    try:

        async def run():
            tidying = asyncio.create_task(memory.give_back())
            await asyncio.sleep(0.3)
            tidying.cancel()

        asyncio.run(run())
    finally:
        gc.enable()
    assert (node() is None) == settled  # without, a collection would take long, and is left to Python
