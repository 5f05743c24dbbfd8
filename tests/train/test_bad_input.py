# SPDX-License-Identifier: Apache-2.0
"""What is no number, and bad data: training stops where it should, and says where."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import TrainerCallback

from cumo.cli import main
from cumo.data import BadSampleError
from cumo.train import NonFiniteError, Recipe, check_recipe, run_stage
from cumo.train import stage as stage_module
from tests.data.samples import Files, llava
from tests.train.tiny import read_log, recipe_of, write_recipe


class Spoil(TrainerCallback):
    """After a step, do something to the model."""

    def __init__(self, step, what):
        self.step, self.what = step, what

    def on_step_end(self, args, state, control, model=None, **kwargs):  # noqa: ARG002
        if state.global_step == self.step:
            self.what(model)


@pytest.fixture
def spoil(monkeypatch):
    """Have runs spoilt after a step."""

    def at(step, what):
        original = stage_module._set_callbacks

        def with_spoiling(trainer, *arguments):
            original(trainer, *arguments)
            trainer.add_callback(Spoil(step, what))

        monkeypatch.setattr(stage_module, "_set_callbacks", with_spoiling)

    return at


@torch.no_grad()
def spoil_router(model):
    model.connector.projection.gate.weight.fill_(float("nan"))


def spoil_gradient(model):
    model.connector.projection.up_proj.register_hook(lambda grad: grad * float("inf"))


def recipe_for(folder, model, path, **changes):
    options = {"checkpoint": {"save_steps": 1}, "steps": 6, "data": {"group_by_modality_length": False}}
    return recipe_of(folder, model, path, **{**options, **changes})


def test_a_loss_that_is_no_number(sparse, data, tmp_path, spoil):
    spoil(2, spoil_router)
    with pytest.raises(NonFiniteError) as raised:
        run_stage(Recipe.from_dict(recipe_for(tmp_path, sparse, data, batch={"per_device_batch_size": 2})))
    message = str(raised.value)
    assert message.startswith("step 3: lm_loss is nan, connector_balance is nan, connector_z is nan, in the pass over ")
    assert message.count(f"{data}:") == 2 and message.count(": row ") == 2 and message.count("sample 's") == 2
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2]
    assert (tmp_path / "checkpoint-2").is_dir() and not (tmp_path / "final").exists()


def test_a_gradient_that_is_no_number(sparse, data, tmp_path, spoil):
    spoil(2, spoil_gradient)
    recipe = Recipe.from_dict(recipe_for(tmp_path, sparse, data))
    message = (
        r"step 3: the gradient's norm is (nan|inf), first in \['connector.projection.up_proj'\], in the passes over "
    )
    with pytest.raises(NonFiniteError, match=message) as raised:
        run_stage(recipe)
    assert str(raised.value).count(": row ") == 4
    assert (tmp_path / "checkpoint-2").is_dir()


def test_the_last_checkpoint_is_good(sparse, data, tmp_path, monkeypatch, spoil):
    """A weight that was spoilt in memory is not in it: the run goes on."""
    with monkeypatch.context():
        spoil(2, spoil_gradient)
        with pytest.raises(NonFiniteError):
            run_stage(Recipe.from_dict(recipe_for(tmp_path, sparse, data)))
    spoil(99, spoil_gradient)
    monkeypatch.undo()
    assert run_stage(Recipe.from_dict(recipe_for(tmp_path, sparse, data))).steps == 6
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.fixture
def faulty(tmp_path):
    """A file of good and bad rows, and what is wrong with the bad ones, by line."""
    (tmp_path / "data").mkdir()
    files = Files(tmp_path / "data")
    good = files.picture("good.png")
    (tmp_path / "data" / "corrupt.png").write_bytes((tmp_path / "data" / good).read_bytes()[:60])
    rows = [
        llava("first", images=[good], id=0),
        llava("missing", images=["absent.png"], id=1),
        llava("corrupt", images=["corrupt.png"], id=2),
        '{"id": 3, "conversations": [',
        {"id": 4, "conversations": llava()["conversations"] * 2 + llava()["conversations"][:1] * 2},
        llava("empty", " ", id=5),
        llava("<image>", images=[good], id=6),
        llava("long" * 100, id=7),
        llava("last", images=[good], id=8),
    ]
    reasons = {
        2: "sample 1: picture '.*absent.png': expected a file, found none",
        3: "sample 2: picture '.*corrupt.png': cannot be decoded",
        4: "sample None: broken JSON",
        5: "sample 4: expected gpt to speak next, got human: 'q'",
        6: "sample 5: expected an answer to 'empty', got an empty one",
        7: "sample 6: expected as many pictures as <image> in the text, got 1 for 2",
        8: "sample 7: expected at most max_length=400 tokens, got 5",
    }
    return files.jsonl(rows).path, reasons


def test_check_data_finds_every_planted_fault(sparse, faulty, tmp_path, capsys):
    path, reasons = faulty
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_for(tmp_path / "run", sparse, path))
    assert main(["train", str(recipe), "--check-data"]) == 2
    told = capsys.readouterr().err
    for line, reason in reasons.items():
        assert any(_fits(entry, path, line, reason) for entry in told.splitlines()), (line, told)
    assert f"9 rows of 1 files: {len(reasons)} faults" in told
    assert not (tmp_path / "run").exists()


def _fits(entry, path, line, reason):
    return re.match(rf"{re.escape(path)}:{line}: row {line}, {reason}", entry)


def test_check_data_of_good_data(sparse, data, tmp_path, capsys):
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_for(tmp_path / "run", sparse, data))
    assert main(["train", str(recipe), "--check-data", "data.workers=2"]) == 0
    assert "24 rows of 1 files: 0 faults" in capsys.readouterr().out


def test_check_data_of_parts_that_are_not_assembled_yet(parts, data, tmp_path, capsys):
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_for(tmp_path / "run", parts, data, stage="pretrain"))
    assert main(["train", str(recipe), "--check-data"]) == 0
    assert "0 faults" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_what_can_be_seen_cheaply_stops_before_training(sparse, faulty, tmp_path, monkeypatch):
    monkeypatch.setattr(stage_module, "load_model", lambda *_: pytest.fail("too late"))
    with pytest.raises(BadSampleError, match=r"data.jsonl:4: row 4, sample None: broken JSON.*\(3 more bad rows\)"):
        run_stage(Recipe.from_dict(recipe_for(tmp_path / "run", sparse, faulty[0])))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_shows_later_stops_at_the_sample(sparse, faulty, tmp_path, workers):
    path = Path(faulty[0])
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1], lines[8]]))
    options = {"data": {"workers": workers, "group_by_modality_length": False}}
    with pytest.raises(BadSampleError) as raised:
        run_stage(Recipe.from_dict(recipe_for(tmp_path / "run", sparse, str(path), **options)))
    assert _fits(str(raised.value), str(path), 2, "sample 1: picture '.*absent.png': expected a file, found none")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_skipping_counts_and_names_every_one(sparse, faulty, tmp_path, caplog, workers):
    path, reasons = faulty
    options = {"data": {"on_bad_sample": "skip", "workers": workers}, "steps": 2}
    with caplog.at_level(logging.WARNING):
        run_stage(Recipe.from_dict(recipe_for(tmp_path / "run", sparse, path, **options)))
    last = next(record.message for record in caplog.records if "samples were left out" in record.message)
    assert last == f"{len(reasons)} samples were left out: " + ", ".join(f"{path}:{line}" for line in reasons)


def test_the_command_says_it_in_a_line(sparse, faulty, tmp_path, capsys):
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_for(tmp_path / "run", sparse, faulty[0]))
    assert main(["train", str(recipe)]) == 2
    assert "cumo train: error: " in capsys.readouterr().err
    assert main(["train", str(tmp_path / "absent.yaml")]) == 2
    assert "absent.yaml: expected a YAML file or one of" in capsys.readouterr().err
    assert main(["train"]) == 2
    assert "recipe: expected a YAML file or a name of --list" in capsys.readouterr().err


def test_the_command_trains_prints_and_lists(sparse, data, tmp_path, capsys):
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_for(tmp_path / "run", sparse, data))
    assert main(["train", str(recipe), "steps=2", "--print"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["steps"] == 2
    assert main(["train", "--list"]) == 0
    assert "mistral-7b/pretrain" in capsys.readouterr().out.split()
    assert main(["train", str(recipe), "steps=2"]) == 0
    assert "final: 2 steps in " in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "final" / "result.json").read_text())["steps"] == 2


def test_batches_that_do_not_fit(sparse, data, tmp_path):
    recipe = recipe_for(tmp_path, sparse, data, batch={"per_device_batch_size": 3})
    with pytest.raises(ValueError, match="batch.global_batch_size: expected a multiple of 3"):
        run_stage(Recipe.from_dict(recipe))


@pytest.mark.parametrize("checked", [False, True], ids=["train", "check-data"])
def test_a_model_that_is_none(data, tmp_path, checked):
    recipe = Recipe.from_dict(recipe_for(tmp_path / "run", str(tmp_path / "absent"), data))
    with pytest.raises(ValueError, match=r"absent.config.json: expected the configuration of a model, found no such"):
        check_recipe(recipe) if checked else run_stage(recipe)


@pytest.mark.parametrize("content", ["", "[", "- a", "stage: &a [*a]", "\0", "stage: a\nstage: b"])
def test_a_damaged_recipe_beside_a_run(tmp_path, content):
    recipe = Recipe.from_dict(recipe_for(tmp_path, "model", "data.json"))
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "recipe.yaml"))):
        run_stage(recipe)


@pytest.mark.parametrize("content", ["", "{}", "[1]", "[" * 20_000, '{"steps": 1, "loss": 1, "seconds": 1, "more": 2}'])
def test_a_damaged_result_of_a_stage(tmp_path, content):
    recipe = Recipe.from_dict(recipe_for(tmp_path, "model", "data.json"))
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "result.json").write_text(content)
    with pytest.raises(ValueError, match="result.json: expected"):
        run_stage(recipe)


@pytest.mark.parametrize("tail", [b"", b"{", b"\xff\n", b"[1]\n", b"{}\n", b"[" * 20_000 + b"\n", b'{"step": 2'])
def test_a_log_that_was_cut_off(tmp_path, tail):
    log = tmp_path / "log.jsonl"
    whole = b'{"step": 1, "loss": 2.0, "seconds": 3.0}\n'
    log.write_bytes(whole + tail)
    assert stage_module._cut_log(log, 5) == 3.0
    assert log.read_bytes() == whole
