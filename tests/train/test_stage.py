# SPDX-License-Identifier: Apache-2.0
"""Stages from parts to an instructed model: what changes, what stays, what is written."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from cumo.checkpoints.convert import convert_to_published
from cumo.config import CuMoConfig
from cumo.models.cumo import CuMoForConditionalGeneration
from cumo.models.processor import CuMoProcessor
from cumo.train import Recipe, run_stage
from cumo.train import stage as stage_module
from cumo.train.stage import load_model, prepare_start
from tests.numerics import relative_error
from tests.train.tiny import read_log, recipe_of, write_parts


def run(folder, model, path, **changes):
    return run_stage(Recipe.from_dict(recipe_of(folder, model, path, **changes)))


def changed(before, after):
    """First steps of the names of tensors that training changed."""
    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert old.keys() == new.keys()
    return {name.split(".")[0] for name in old if not torch.equal(old[name], new[name])}


def test_from_parts_to_an_instructed_model(parts, data, tmp_path):
    """All of CuMo's stages, each from the folder of the one before."""
    first = run(tmp_path / "1", parts, data, stage="pretrain")
    assert first.folder == tmp_path / "1" / "final" and first.steps == 4 and first.seconds > 0
    assert changed(tmp_path / "1" / "start", first.folder) == {"connector"}
    second = run(tmp_path / "2", str(first.folder), data, stage="prefinetune")
    assert changed(first.folder, second.folder) == {"vision_tower", "connector", "language_model"}
    upcycle = {"vision": 4, "connector": 4, "top_k": 2, "noise": 0.1}
    third = run(tmp_path / "3", str(second.folder), data, stage="instruct", upcycle=upcycle)
    model = CuMoForConditionalGeneration.from_pretrained(third.folder)
    assert model.config.vision_config.num_experts == model.config.connector_num_experts == 4
    assert CuMoProcessor.from_pretrained(third.folder).image_seq_length == 9
    fourth = run(tmp_path / "4", str(third.folder), data, stage="finetune")
    assert changed(third.folder, fourth.folder) == {"vision_tower", "connector", "language_model"}
    assert fourth.loss == pytest.approx(read_log(tmp_path / "4")[-1]["loss"])


def test_continuing_does_not_upcycle_again(sparse, data, tmp_path):
    with pytest.raises(ValueError, match="vision: expected a dense one, got 4 experts; to continue from them, train"):
        run(tmp_path, sparse, data, stage="instruct", upcycle={"vision": 4, "connector": 4})
    assert not (tmp_path / "start").exists()


def test_learning_rates_by_part(sparse, data, tmp_path):
    rates = {"vision": 1e-4, "connector": True, "text": False, "routers": 5e-4}
    run(tmp_path, sparse, data, train=rates, schedule={"name": "constant", "warmup": 0})
    assert read_log(tmp_path)[0]["lr"] == {"vision": 1e-4, "connector": 1e-3, "routers": 5e-4}


def test_schedule(sparse, data, tmp_path):
    run(tmp_path, sparse, data, steps=5, schedule={"name": "linear", "warmup": 2})
    rates = [line["lr"]["text"] for line in read_log(tmp_path)]
    assert rates == pytest.approx([0, 5e-4, 1e-3, 1e-3 * 2 / 3, 1e-3 / 3])


def test_a_frozen_encoder_keeps_no_graph(sparse, data, tmp_path):
    recipe = Recipe.from_dict(recipe_of(tmp_path, sparse, data, train={"vision": False}))
    model = load_model(recipe, prepare_start(recipe)).train()
    pixels = torch.randn(1, 3, 12, 12)
    grads = []
    model.vision_tower.register_forward_hook(lambda *_: grads.append(torch.is_grad_enabled()))
    features = model.get_image_features(pixels)
    assert grads == [False] and features.embeddings.requires_grad and not features.vision_losses.balance.requires_grad
    trained = load_model(Recipe.from_dict(recipe_of(tmp_path, sparse, data)), prepare_start(recipe))
    assert trained.get_image_features(pixels).vision_losses.balance.requires_grad


def test_losses_of_the_recipe(sparse, data, tmp_path):
    aux = {"mode": "switch", "balance": 0.5, "z": 0.0}
    result = run(tmp_path, sparse, data, aux=aux)
    config = CuMoForConditionalGeneration.from_pretrained(result.folder).config
    assert (config.aux_loss, config.balance_loss_coef, config.router_z_loss_coef) == ("switch", 0.5, 0.0)
    line = next(line for line in read_log(tmp_path) if "vision_z" in line)
    expected = line["lm_loss"] + 0.5 * (line["vision_balance"] + line["connector_balance"])
    assert line["loss"] == pytest.approx(expected) and line["vision_balance"] > 1.9, "top-2 of an even load is 2"


def test_the_log(sparse, data, tmp_path):
    run(tmp_path, sparse, data, log_steps=2, data={"group_by_modality_length": False})
    log = read_log(tmp_path)
    assert [line["step"] for line in log] == [2, 4] and [line["epoch"] for line in log] == [0.333333, 0.666667]
    for line in log:
        assert line["tokens/s"] > 0 and line["images/s"] > 0 and line["grad_norm"] > 0
        assert set(line["expert_load"]["vision"]) == {"0", "1"}, "of the layers that are computed"
        for scales in line["expert_load"]["vision"].values():
            assert set(scales) == {"1", "2"}
            assert all(sum(load) == pytest.approx(1) and len(load) == 4 for load in scales.values())
        assert sum(line["expert_load"]["connector"]) == pytest.approx(1)
        for key in ("router_entropy", "choice_entropy"):
            assert 0 < line[key]["connector"] <= 1
            assert all(0 < value <= 1 for scales in line[key]["vision"].values() for value in scales.values())


def test_experts_of_the_language_model(data, tmp_path):
    run(tmp_path / "run", write_parts(tmp_path, "mixtral"), data, stage="prefinetune")
    line = read_log(tmp_path / "run")[0]
    assert line["text_balance"] > 0.9 and line["text_z"] > 0 and "vision_balance" not in line
    assert set(line["expert_load"]["text"]) == {"0", "1"} and len(line["expert_load"]["text"]["0"]) == 4
    assert sum(line["expert_load"]["text"]["1"]) == pytest.approx(1)


def test_upcycling_the_language_model(dense, data, tmp_path):
    result = run(tmp_path, dense, data, stage="instruct", upcycle={"text": 4, "noise": 0.1})
    config = CuMoForConditionalGeneration.from_pretrained(result.folder).config
    assert config.text_config.num_local_experts == 4 and config.vision_config.num_experts == 1
    assert set(read_log(tmp_path)[0]["expert_load"]) == {"text"}


@pytest.mark.parametrize("packing", [None, {"max_length": 400, "max_images": 3}], ids=["plain", "packed"])
def test_training_learns(sparse, data, tmp_path, packing):
    options = {"data": {"packing": packing}, "steps": 25, "optimizer": {"lr": 1e-2}}
    run(tmp_path, sparse, data, gradient_checkpointing=True, **options)
    log = read_log(tmp_path)
    assert log[-1]["lm_loss"] < 0.6 * log[0]["lm_loss"]


def test_half_precision(sparse, data, tmp_path):
    result = run(tmp_path, sparse, data, precision="bf16", train={"vision": False})
    tensors = load_file(result.folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.loads((result.folder / "config.json").read_text())["dtype"] == "bfloat16"
    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert {saved[name].dtype for name in saved if name.startswith("language_model")} == {torch.float32}
    assert {saved[name].dtype for name in saved if name.startswith("vision_tower")} == {torch.bfloat16}


def test_other_arguments_of_trainer(sparse, data, tmp_path):
    run(tmp_path / "1", sparse, data, trainer={"lr_scheduler_kwargs": {"num_cycles": 2}})
    with pytest.raises(ValueError, match="trainer.max_steps: .* is said by other keys of the recipe"):
        run(tmp_path / "2", sparse, data, trainer={"max_steps": 3})
    with pytest.raises(ValueError, match="trainer.max_step: .* does not exist"):
        run(tmp_path / "3", sparse, data, trainer={"max_step": 3})
    with pytest.raises(ValueError, match="trainer: no-such-optimizer is not a valid"):
        run(tmp_path / "4", sparse, data, optimizer={"name": "no-such-optimizer"})


def test_epochs(sparse, data, tmp_path):
    assert run(tmp_path, sparse, data, steps=None, epochs=0.5).steps == 3


def test_activation_checkpointing_of_encoder_and_language_model(sparse, data, tmp_path, monkeypatch):
    """Both recompute, and so draw the dropout of their first pass again: the same gradients."""
    layers, caches = [], []

    def watched(recipe, start):
        model = load_model(recipe, start)
        for layer in (*model.vision_tower.layers, *model.language_model.model.layers):
            layer.register_forward_pre_hook(lambda layer, *_: layers.append(layer.gradient_checkpointing))
        model.language_model.register_forward_pre_hook(
            lambda _module, _args, options: caches.append(options["use_cache"]), with_kwargs=True
        )
        return model

    monkeypatch.setattr("cumo.train.stage.load_model", watched)
    lora = {"rank": 4, "dropout": 0.5}
    norms = []
    for checkpointing in (True, False):
        folder = tmp_path / str(checkpointing)
        run(folder, sparse, data, lora=lora, gradient_checkpointing=checkpointing)
        assert layers and all(flag is checkpointing for flag in layers)
        assert not any(caches), "no keys and values are kept"
        layers.clear()
        norms.append([(line["loss"], line["grad_norm"]) for line in read_log(folder)])
    for one, other in zip(*norms, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_numbers_for_other_logs(sparse, data, tmp_path, monkeypatch):
    """tensorboard and the like get plain numbers."""
    told = []

    class Listener(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):  # noqa: ARG002
            told.append(logs)

    original = stage_module._set_callbacks
    monkeypatch.setattr(
        stage_module,
        "_set_callbacks",
        lambda trainer, *rest: (original(trainer, *rest), trainer.add_callback(Listener())),
    )
    run(tmp_path, sparse, data)
    logs = [log for log in told if "loss" in log]
    assert len(logs) == 4 and all(isinstance(value, float) for log in logs for value in log.values())
    log = next(log for log in logs if "vision_balance" in log)
    assert {"lr/vision", "lr/routers", "tokens/s", "grad_norm", "router_entropy/connector"} <= set(log)
    assert 0 <= log["expert_load/vision/0/2/least"] <= 0.25 <= log["expert_load/vision/0/2/most"] <= 1


@pytest.mark.parametrize("shown", ["terminal", "file"])
def test_progress(sparse, data, tmp_path, capsys, monkeypatch, shown):
    monkeypatch.setattr("sys.stderr.isatty", lambda: shown == "terminal", raising=False)
    run(tmp_path, sparse, data)
    told = capsys.readouterr().err
    assert "finetune" in told and "loss" in told and ("4/4" if shown == "terminal" else "step 4 of 4, loss ") in told


def test_deepspeed_that_is_not_there(sparse, data, tmp_path):
    if importlib.util.find_spec("deepspeed") is not None:
        pytest.skip("DeepSpeed is there")
    with pytest.raises(ValueError, match="distributed: expected ddp or fsdp2, as DeepSpeed is not installed"):
        run(tmp_path, sparse, data, distributed="zero3.json")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A model as the published code leaves it: its layout, and a tokenizer.model instead of a processor."""
    mistral_common = pytest.importorskip("mistral_common", reason="holds the tokenizer model of Mistral")
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    CuMoForConditionalGeneration(CuMoConfig.from_preset("tiny")).save_pretrained(folder / "native")
    convert_to_published(folder / "native", folder / "model")
    tokenizer = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    shutil.copyfile(tokenizer, folder / "model" / "tokenizer.model")
    return folder / "model"


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["whole", "lora"])
def test_a_published_model_is_fine_tuned_with_its_experts(published, data, tmp_path, lora):
    """The published project's own code resets them, or fails."""
    start = CuMoForConditionalGeneration.from_pretrained(published)
    result = run(tmp_path, str(published), data, lora=lora, train={"vision": False})
    model = CuMoForConditionalGeneration.from_pretrained(result.folder)
    states = start.state_dict(), model.state_dict()
    assert states[0].keys() == states[1].keys()
    differing = {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    assert {name.split(".")[0] for name in differing} == {"connector", "language_model"}
    assert relative_error(states[1]["connector.projection.up_proj"], states[0]["connector.projection.up_proj"]) < 0.5
    assert CuMoProcessor.from_pretrained(result.folder).image_token_id == 32000
