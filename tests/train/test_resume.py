# SPDX-License-Identifier: Apache-2.0
"""A run that was killed at any moment goes on as if nothing had happened: bit for bit, on one process."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cumo.train import Recipe, run_stage
from tests.train.tiny import read_log, recipe_of, write_recipe

STEPS = 9  # one and a half epochs
CLOCK = ("seconds", "tokens/s", "images/s")


@pytest.fixture(autouse=True)
def _one_thread():
    """Sums of several threads have an order of their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(sparse, tmp_path_factory):
    """One whose attention has dropout, so that the state of random numbers matters."""
    folder = tmp_path_factory.mktemp("dropout") / "model"
    shutil.copytree(sparse, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["attention_dropout"] = 0.2
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def recipe_for(folder, model, data, **changes):
    return recipe_of(
        folder,
        model,
        data,
        batch={"per_device_batch_size": 2},
        checkpoint={"save_steps": 3, "total_limit": 1},
        optimizer={"lr": 3e-3},
        **{"steps": STEPS, **changes},
    )


@pytest.fixture(scope="module")
def uninterrupted(model, data, tmp_path_factory):
    """The folder of a run in peace."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    torch.set_num_threads(1)
    run_stage(Recipe.from_dict(recipe_for(folder, model, data)))
    return folder


def without_clock(log):
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in log]


def assert_equal_runs(folder, expected):
    """Every number of the log and every weight."""
    assert without_clock(read_log(folder)) == without_clock(read_log(expected))
    tensors, others = (load_file(run / "final" / "model.safetensors") for run in (folder, expected))
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name


def run_interrupted(recipe, place):
    command = [sys.executable, "-m", "tests.train.interrupted", str(recipe), place]
    return subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)


def test_random_numbers_matter(uninterrupted, sparse, data, tmp_path):
    run_stage(Recipe.from_dict(recipe_for(tmp_path, sparse, data)))
    losses, without = ([line["loss"] for line in read_log(folder)] for folder in (uninterrupted, tmp_path))
    assert all(one != other for one, other in zip(losses, without, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("place", ["between", "optimizer", "manifest", "renamed", "removed", "final"])
def test_killed_and_gone_on(uninterrupted, model, data, tmp_path, place):
    folder = tmp_path / "run"
    recipe = recipe_for(folder, model, data)
    done = run_interrupted(write_recipe(tmp_path / "recipe.yaml", recipe), place)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert not (folder / "final").exists()
    left = sorted(path.name for path in folder.glob("checkpoint-*"))
    assert (
        left
        == {
            "between": ["checkpoint-3"],
            "optimizer": ["checkpoint-3"],
            "manifest": ["checkpoint-3"],
            "renamed": ["checkpoint-3", "checkpoint-6"],
            "removed": ["checkpoint-6"],
            "final": ["checkpoint-9"],
        }[place]
    )
    run_stage(Recipe.from_dict(recipe))
    assert_equal_runs(folder, uninterrupted)
    assert not list(folder.glob(".*"))


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint(uninterrupted, model, data, tmp_path):
    folder = tmp_path / "run"
    recipe = recipe_for(folder, model, data)
    done = run_interrupted(write_recipe(tmp_path / "recipe.yaml", recipe), "full")
    assert done.returncode == 1
    assert "CheckpointError: checkpoint-6: could not be written" in done.stderr
    assert "the last one is checkpoint-3" in done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-3", "log.jsonl", "recipe.yaml"]
    run_stage(Recipe.from_dict(recipe))
    assert_equal_runs(folder, uninterrupted)


def test_going_on_with_workers_and_in_other_passes_sees_the_same_samples(uninterrupted, model, data, tmp_path):
    """Not bit for bit, as sums are divided otherwise, and dropout with them."""
    recipe = recipe_for(tmp_path, model, data)
    run_stage(Recipe.from_dict({**recipe, "checkpoint": {"save_steps": 3, "total_limit": 3}}))
    assert_equal_runs(tmp_path, uninterrupted)
    for name in ("final", "checkpoint-6", "checkpoint-9"):
        shutil.rmtree(tmp_path / name)
    recipe["data"]["workers"] = 2
    recipe["batch"] = {**recipe["batch"], "per_device_batch_size": 4}
    run_stage(Recipe.from_dict(recipe))
    log, expected = read_log(tmp_path), read_log(uninterrupted)
    assert without_clock(log[:3]) == without_clock(expected[:3])
    for line, other in zip(log[3:], expected[3:], strict=True):
        assert line["lm_loss"] != other["lm_loss"], "dropout is drawn anew"
        assert line["lm_loss"] == pytest.approx(other["lm_loss"], rel=0.1)
        assert line.get("connector_z", 0.0) == pytest.approx(other.get("connector_z", 0.0), rel=0.02)


def test_going_on_within_the_steps_of_a_log_line(sparse, data, tmp_path):
    """What was summed up before the checkpoint counts."""
    logs = []
    for name in ("whole", "stopped"):
        recipe = recipe_for(tmp_path / name, sparse, data, log_steps=2, steps=6)
        recipe["checkpoint"] = {"save_steps": 3, "total_limit": 3}
        run_stage(Recipe.from_dict(recipe))
        if name == "stopped":
            for folder in ("final", "checkpoint-6"):
                shutil.rmtree(tmp_path / name / folder)
            run_stage(Recipe.from_dict(recipe))
        logs.append(without_clock(read_log(tmp_path / name)))
    assert [line["step"] for line in logs[0]] == [2, 4, 6]
    assert logs[0] == logs[1]


def test_a_log_line_cut_off_is_no_obstacle(uninterrupted, model, data, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    shutil.rmtree(folder / "final")
    text = (folder / "log.jsonl").read_text()
    (folder / "log.jsonl").write_text(text + '{"step": 10, "lo')
    run_stage(Recipe.from_dict(recipe_for(folder, model, data)))
    assert_equal_runs(folder, uninterrupted)


def test_a_stage_that_is_done_is_not_done_again(uninterrupted, model, data, monkeypatch):
    monkeypatch.setattr("cumo.train.stage.load_model", lambda *_: pytest.fail("trained again"))
    result = run_stage(Recipe.from_dict(recipe_for(uninterrupted, model, data)))
    assert result.steps == STEPS and result.folder == uninterrupted / "final"


def test_another_recipe_is_refused(uninterrupted, model, data):
    recipe = recipe_for(uninterrupted, model, data, seed=7)
    with pytest.raises(ValueError, match="output_dir: expected a folder without a run .*seed: 42 there, 7 now"):
        run_stage(Recipe.from_dict(recipe))
