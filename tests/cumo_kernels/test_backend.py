# SPDX-License-Identifier: Apache-2.0
"""Which backend runs an operation, and what is said where it cannot."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cumo_kernels as ck
from cumo_kernels.backend import backend_for

ROOT = Path(__file__).resolve().parents[2]
CALL = "import torch, cumo_kernels as ck; print(ck.topk_gating(torch.randn(5, 4), 2).weight_TK.shape)"
# Stands in the way of `import triton`, as if it were not installed.
NO_TRITON = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name == "triton" else find_spec(name, *args)
"""


def run_python(code, **environment):
    """A fresh interpreter: the environment is read when the package is imported."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("CUMO_BACKEND", "TRITON_INTERPRET")}
    command = [sys.executable, "-W", "ignore", "-c", code]
    environment = {**inherited, "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_default_is_the_reference_on_a_cpu_and_triton_on_a_gpu(device):
    assert backend_for(torch.zeros(1)) == "reference"
    if device.type == "cuda":
        assert backend_for(torch.zeros(1, device=device)) == "triton"


def test_forced_backends_nest_and_end_with_their_block(device):
    with ck.use_backend("reference"):
        with ck.use_backend("triton"):
            assert backend_for(torch.zeros(1, device=device)) == "triton"
        assert backend_for(torch.zeros(1, device=device)) == "reference"
    assert backend_for(torch.zeros(1)) == "reference"


def test_forced_backend_ends_with_an_exception():
    with pytest.raises(KeyError), ck.use_backend("triton"):
        raise KeyError
    assert backend_for(torch.zeros(1)) == "reference"


def test_unknown_backend_is_refused():
    message = r"backend: expected one of \['triton', 'reference'\], got 'cuda'"
    with pytest.raises(ValueError, match=message), ck.use_backend("cuda"):
        pass


def test_triton_without_a_gpu_or_the_interpreter_is_refused():
    result = run_python(CALL, CUMO_BACKEND="triton")
    assert result.returncode == 1
    assert "RuntimeError: backend 'triton': got tensors on cpu, expected a CUDA device" in result.stderr


def test_triton_gives_shapes_on_the_meta_device_wherever_it_is():
    result = run_python(CALL.replace("(5, 4)", "(5, 4, device='meta')"), CUMO_BACKEND="triton")
    assert result.stdout.strip() == "torch.Size([5, 2])", result.stderr


@pytest.mark.parametrize("variable", ["triton", "reference", ""])
def test_environment_forces_a_backend(variable):
    look = CALL + "; from cumo_kernels.backend import backend_for; print(backend_for(torch.zeros(1)))"
    result = run_python(look, CUMO_BACKEND=variable, TRITON_INTERPRET="1")
    assert result.stdout.split() == ["torch.Size([5,", "2])", variable or "reference"], result.stderr


def test_use_backend_overrides_the_environment():
    code = "import cumo_kernels as ck\nwith ck.use_backend('reference'):\n    " + CALL.replace("; ", "\n    ")
    result = run_python(code, CUMO_BACKEND="triton")
    assert result.returncode == 0, result.stderr


def test_unknown_backend_in_the_environment_is_refused():
    result = run_python(CALL, CUMO_BACKEND="cuda")
    assert result.returncode == 1
    assert "ValueError: CUMO_BACKEND: expected one of ['triton', 'reference'], got 'cuda'" in result.stderr


def test_package_works_without_triton():
    result = run_python(NO_TRITON + CALL + "\nassert not any(n.partition('.')[0] == 'triton' for n in sys.modules)")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "torch.Size([5, 2])"


def test_forcing_triton_where_it_is_missing_is_refused():
    result = run_python(NO_TRITON + CALL, CUMO_BACKEND="triton")
    assert result.returncode == 1
    assert "RuntimeError: backend 'triton': Triton is not installed" in result.stderr


def test_importing_the_package_imports_no_triton():
    result = run_python("import sys, cumo_kernels; print('triton' in sys.modules)")
    assert result.stdout.strip() == "False", result.stderr
