# SPDX-License-Identifier: Apache-2.0
"""The way of a launch on a GPU - specialisation, compilation, descriptors, Triton's launcher, the driver - without one.

Only what the kernels compute is left out; the other tests see to that in the interpreter.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

HERE = Path(__file__).parent
INCLUDE = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
KERNELS = {
    "activation_grad",
    "combine",
    "combine_backward",
    "count_experts",
    "gating_losses",
    "grad_rows",
    "grouped_dact",
    "grouped_gemm",
    "grouped_wgrad",
    "linear_gating",
    "linear_gating_backward",
    "permute",
    "plan_dispatch",
    "topk_gating",
    "topk_gating_backward",
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU that is here shows it"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="compiles a stand-in for the driver, as Triton its launcher"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A libcuda that runs nothing."""
    path = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    options = ["-shared", "-fPIC", f"-I{INCLUDE}", "-Wl,-soname,libcuda.so.1", "-o", path]
    subprocess.run(["cc", *options, HERE / "driver_without_device.c"], check=True)
    return path


def run(library, case):
    """A process whose kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_LIBCUDA_PATH": str(library.parent)}
    command = [sys.executable, "-m", "tests.cumo_kernels.native_run", str(library), case]
    return subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(("case", "uses_tma"), [("dense", True), ("gated", True), ("odd", False)])
def test_every_kernel_is_launched_as_listed(library, case, uses_tma):
    """What `cumo_kernels.inspect` compiles for these launches is what Triton compiles for them, no more, no less."""
    done = run(library, case)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["launches"] == report["of the driver"] > 0
    assert (report["only listed"], report["only compiled"]) == ([], [])
    assert (report["descriptors"] > 0) == uses_tma
    assert set(report["kernels"]) <= KERNELS
    if case == "dense":
        assert set(report["kernels"]) == KERNELS


def test_the_driver_refuses_what_a_gpu_would(library):
    done = run(library, "too many programs")
    assert done.returncode != 0
    assert "gridDimY: 65536" in done.stderr
