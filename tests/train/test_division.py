# SPDX-License-Identifier: Apache-2.0
"""A step is the same however it is divided among passes and processes."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cumo.models.processor import CuMoProcessor
from cumo.train import Recipe, run_stage
from cumo.train.order import stream_of
from cumo.train.stage import load_dataset
from tests.numerics import relative_error
from tests.train.tiny import read_log, recipe_of, train_in_processes, write_recipe

# Modalities mixed within a step, so that trained tokens and pictures are spread unevenly over its passes
UNGROUPED = {"group_by_modality_length": False}
NUMBERS = ("loss", "lm_loss", "vision_balance", "vision_z", "connector_balance", "connector_z", "grad_norm")


@pytest.fixture(scope="module")
def whole(sparse, data, tmp_path_factory):
    """The log of one process whose every step is one pass."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_stage(Recipe.from_dict(recipe_of(folder, sparse, data, data=UNGROUPED)))
    return read_log(folder)


def assert_same_steps(log, expected):
    assert len(log) == len(expected) == 4
    for line, other in zip(log, expected, strict=True):
        for name in NUMBERS:
            assert line[name] == pytest.approx(other[name], rel=1e-5), f"step {line['step']}: {name}"
        assert line["expert_load"] == other["expert_load"], "the same tokens go to the same experts"


def test_the_steps_are_such_that_a_wrong_division_would_show(whole, sparse, data):
    assert len({line["loss"] for line in whole}) == 4
    dataset = load_dataset(
        Recipe.from_dict(recipe_of(Path("unused"), sparse, data)), CuMoProcessor.from_pretrained(sparse)
    )
    order = list(stream_of(dataset, 4, 4, grouped=False, seed=42))
    for begin in range(0, 16, 4):
        examples = [dataset[index] for index in order[begin : begin + 4]]
        assert len({int((example["labels"] != -100).sum()) for example in examples}) > 1
        assert len({len(example.get("pixel_values", ())) for example in examples}) > 1


@pytest.mark.parametrize("size", [1, 2])
def test_accumulation(whole, sparse, data, tmp_path, size):
    recipe = recipe_of(tmp_path, sparse, data, data=UNGROUPED, batch={"per_device_batch_size": size})
    run_stage(Recipe.from_dict(recipe))
    assert_same_steps(read_log(tmp_path), whole)


def assert_sharded(checkpoint, kind):
    """Parameters lie in as many pieces as there are processes, or not: the kind asked for is the one that ran."""
    assert (checkpoint / "pytorch_model_fsdp_0").is_dir() == (kind == "fsdp2")
    assert (checkpoint / "model.safetensors").is_file() == (kind == "ddp")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_with_accumulation_and_activation_checkpointing(whole, sparse, data, tmp_path, kind):
    recipe = recipe_of(
        tmp_path / "run",
        sparse,
        data,
        data=UNGROUPED,
        batch={"per_device_batch_size": 1},
        distributed=kind,
        gradient_checkpointing=True,
    )
    train_in_processes(write_recipe(tmp_path / "recipe.yaml", recipe))
    assert_same_steps(read_log(tmp_path / "run"), whole)
    assert_sharded(tmp_path / "run" / "checkpoint-4", kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_go_on_where_they_stopped(whole, sparse, data, tmp_path, kind):
    """Weights, optimizer and order of samples come back; and what is saved at the end is the model."""
    options = {"batch": {"per_device_batch_size": 2}, "checkpoint": {"save_steps": 2}, "distributed": kind}
    recipe = recipe_of(tmp_path / "run", sparse, data, data=UNGROUPED, **options)
    path = write_recipe(tmp_path / "recipe.yaml", recipe)
    train_in_processes(path)
    for name in ("final", "checkpoint-4"):
        shutil.move(tmp_path / "run" / name, tmp_path / name)
    train_in_processes(path)
    assert_same_steps(read_log(tmp_path / "run"), whole)
    assert_sharded(tmp_path / "run" / "checkpoint-4", kind)
    first, second = (load_file(folder / "final" / "model.safetensors") for folder in (tmp_path, tmp_path / "run"))
    start = load_file(Path(sparse) / "model.safetensors")
    assert first.keys() == second.keys() == start.keys()
    for name, tensor in first.items():
        assert relative_error(second[name], tensor) <= 1e-5, name
    assert sum(not torch.equal(first[name], start[name]) for name in start) > len(start) / 2
