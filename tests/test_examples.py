# SPDX-License-Identifier: Apache-2.0
"""Every example runs as it stands, and says what it should."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, *arguments, processes=1):
    """Output of an example."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    # on a CPU the reference runs, as for a user: the interpreter of the tests is not theirs
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [*launcher, str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    result = subprocess.run(command, env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def numbers(pattern, text):
    """What a pattern captures, as floats."""
    found = [float(match) for match in re.findall(pattern, text)]
    assert found, text
    return found


@pytest.mark.slow
def test_upcycle_vit():
    pytest.importorskip("transformers")
    shown = run("upcycle_vit")
    assert max(numbers(r"output changed by (\S+)", shown)) < 1e-5
    losses = numbers(r"loss (\S+),", shown)
    assert len(losses) == 5 and losses[-1] < losses[0]


@pytest.mark.slow
def test_transformers_experts():
    pytest.importorskip("transformers")
    shown = run("transformers_experts")
    assert shown.count("'fused'") == 4, "two layers of each of two models"
    losses = numbers(r"loss (\S+)", shown)
    assert len(losses) == 6 and losses[2] < losses[0] and losses[5] < losses[3]


@pytest.mark.slow
def test_plain_module():
    shown = run("plain_module")
    assert "output torch.bfloat16" in shown or "output torch.float32" in shown
    assert max(numbers(r"off by (\S+)", shown)) < 1e-5


@pytest.mark.slow
def test_lora_experts():
    for package in ("transformers", "peft"):
        pytest.importorskip(package)
    shown = run("lora_experts")
    losses = numbers(r"loss (\S+)", shown)
    assert losses[-1] < losses[0]
    assert max(numbers(r"merged: off by (\S+)", shown)) < 1e-5


@pytest.mark.slow
def test_expert_parallel():
    shown = run("expert_parallel", processes=2)
    errors = numbers(r"by (\d\S*e[+-]\d+)", shown)  # the processes may write into each other's lines
    assert len(errors) == 4 and max(errors) < 1e-5


@pytest.mark.slow
def test_expert_load(tmp_path):
    for package in ("transformers", "matplotlib"):
        pytest.importorskip(package)
    shown = run("expert_load", tmp_path / "load.png")
    assert len(numbers(r"evenness (\S+) of 1", shown)) == 2
    assert (tmp_path / "load.png").stat().st_size > 5000


def test_every_example_has_a_test():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {name.removeprefix("test_") for name in globals() if name.startswith("test_")} - {
        "every_example_has_a_test"
    }
