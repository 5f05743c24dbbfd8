# SPDX-License-Identifier: Apache-2.0
"""First use by several threads, forked and spawned processes, workers of a DataLoader: each in a process of its own
with a time limit, so that a deadlock fails, and on a CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton"])
SECONDS = 180


def run_job(name, argument):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("CUMO_BACKEND", None)
    code = f"from tests.properties import jobs; jobs.{name}({argument!r}); print('done')"
    command = [sys.executable, "-W", "ignore", "-c", code]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert result.stdout.split() == ["done"], result.stderr
    assert result.returncode == 0, result.stderr


@BACKENDS
def test_first_use_by_several_threads(backend):
    run_job("first_use_in_threads", backend)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=pytest.mark.slow)])
def test_forked_processes(backend):
    run_job("fork", backend)


@pytest.mark.slow
def test_spawned_processes():
    run_job("spawn", "triton")


@pytest.mark.parametrize(
    "start", ["fork", *(pytest.param(start, marks=pytest.mark.slow) for start in ("spawn", "forkserver"))]
)
def test_workers_of_a_data_loader(start):
    run_job("loader", start)
