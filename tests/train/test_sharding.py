# SPDX-License-Identifier: Apache-2.0
"""How processes part."""

import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed

from cumo.train.sharding import leave_processes

TASKS = Path("/proc/self/task")
# In a process of its own, where no other test has left threads behind
PART = """
import time
from pathlib import Path
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from cumo.train.sharding import leave_processes

def threads():
    return sum("gloo" in task.read_text() for task in Path("/proc/self/task").glob("*/comm"))

distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))  # kept, as by DTensor's caches
mesh.get_group()
while not threads():  # they name themselves
    time.sleep(0.01)
leave_processes()
print("threads left:", threads())
"""


@pytest.mark.skipif(not TASKS.is_dir(), reason="lists threads as Linux does")
def test_threads_end_with_their_process_group():
    """One that outlives the interpreter can abort it; a mesh that something caches keeps them alive."""
    done = subprocess.run([sys.executable, "-c", PART], capture_output=True, text=True, timeout=120)
    assert done.stdout == "threads left: 0\n", done.stderr


def test_nothing_to_leave():
    leave_processes()
    assert not distributed.is_initialized()
