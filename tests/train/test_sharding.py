# SPDX-License-Identifier: Apache-2.0
"""How processes part."""

from pathlib import Path

import pytest
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from cumo.train.sharding import leave_processes

TASKS = Path("/proc/self/task")


def threads_of_gloo():
    """Their number."""
    return sum("gloo" in task.read_text() for task in TASKS.glob("*/comm"))


@pytest.mark.skipif(not TASKS.is_dir(), reason="lists threads as Linux does")
def test_threads_end_with_their_process_group():
    """One that outlives the interpreter can abort it; a mesh that something caches keeps them alive."""
    before = threads_of_gloo()  # those that other tests left behind may end too
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    mesh.get_group()
    assert threads_of_gloo() > before
    leave_processes()
    assert threads_of_gloo() <= before
    assert mesh.size() == 1


def test_nothing_to_leave():
    leave_processes()
    assert not distributed.is_initialized()
