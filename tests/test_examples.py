# SPDX-License-Identifier: Apache-2.0
"""Every example runs as it stands, and says what it should."""

import json
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
    shown = run("expert_load", "--output", tmp_path / "load.png")
    assert len(numbers(r"evenness (\S+) of 1", shown)) == 4, "two layers at two scales"
    assert (tmp_path / "load.png").stat().st_size > 5000
    # of a log, with any number of experts
    twelve = [0.0] * 6 + [1 / 6] * 6
    load = {"vision": {"0": {"1": [0.25, 0.75]}}, "connector": [0.5, 0.5], "text": {"0": twelve, "1": twelve}}
    lines = [{"step": 1, "expert_load": {"connector": [1.0, 0.0]}}, {"step": 2, "expert_load": load}, {"step": 3}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = run("expert_load", "--log", tmp_path / "log.jsonl", "--output", tmp_path / "log.png")
    assert "encoder, scale 1, layer 0: [0.25, 0.75], evenness 0.811 of 1" in shown
    assert "connector, layer 0: [0.5, 0.5], evenness 1.000 of 1" in shown and shown.count("0.167") == 12
    assert (tmp_path / "log.png").stat().st_size > 5000


@pytest.mark.slow
def test_expert_load_of_a_checkpoint(tmp_path):
    for package in ("transformers", "matplotlib"):
        pytest.importorskip(package)
    from tests.inference.tiny import picture, save_model

    save_model(tmp_path / "model")
    paths = [tmp_path / f"{index}.png" for index in range(2)]
    for index, path in enumerate(paths):
        picture(index).save(path)
    options = ("--model", tmp_path / "model", "--output", tmp_path / "load.png", *paths)
    assert len(numbers(r"evenness (\S+) of 1", run("expert_load", *options))) >= 2
    assert (tmp_path / "load.png").stat().st_size > 5000


def test_every_example_has_a_test():
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= tests
