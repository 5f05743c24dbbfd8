# SPDX-License-Identifier: Apache-2.0
"""LoRA: what trains, what is saved, and that loading and merging give the trained model."""

import argparse
import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from cumo.checkpoints import convert
from cumo.checkpoints.lora import is_adapter
from cumo.models.cumo import CuMoForConditionalGeneration
from cumo.models.processor import CuMoProcessor
from cumo.train import Recipe, run_stage
from cumo.train import stage as stage_module
from cumo.train.stage import load_model, prepare_start
from tests.models.tiny import tiny_model
from tests.numerics import relative_error
from tests.train.tiny import read_log, recipe_of, train_in_processes, write_parts, write_recipe

LORA = {"rank": 4, "alpha": 8, "dropout": 0.1}


def lora_recipe(folder, model, path, **changes):
    options = {"lora": LORA, "train": {"vision": False}, "optimizer": {"lr": 1e-2}, **changes}
    return recipe_of(folder, model, path, **options)


def batch(processor):
    """A question about a picture."""
    pixels = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    return {"input_ids": torch.tensor([[1] + [processor.image_token_id] * 9 + [5, 6, 7]]), "pixel_values": pixels}


@pytest.fixture(scope="module")
def trained(sparse, data, tmp_path_factory):
    """Its folder, the model in memory after the last step, and the logits."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_module, "load_model", lambda *arguments: kept.append(load_model(*arguments)) or kept[-1])
        result = run_stage(Recipe.from_dict(lora_recipe(folder, sparse, data, steps=8)))
    model = kept[0].eval()
    inputs = batch(CuMoProcessor.from_pretrained(result.folder))
    with torch.no_grad():
        return result.folder, model, model(**inputs).logits


def test_adapters_on_the_language_model_alone(trained):
    _, model, _ = trained
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trains if "lora_" in name} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }
    assert all(name.startswith(("language_model.", "connector.")) for name in trains)
    assert not any(name.startswith(("connector.", "vision_tower.")) and "lora_" in name for name in trains)
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in trains if "lora_" in name}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {parameter.dtype for name, parameter in model.named_parameters() if name in trains} == {torch.float32}


def test_training_changed_the_answers(trained, sparse):
    _, _, logits = trained
    before = CuMoForConditionalGeneration.from_pretrained(sparse)
    with torch.no_grad():
        other = before(**batch(CuMoProcessor.from_pretrained(sparse))).logits
    assert relative_error(other, logits) > 1e-2


def test_the_folder_holds_what_was_trained_and_no_more(trained):
    folder, _, _ = trained
    assert is_adapter(folder)
    names = {}
    for file in ("adapter_model.safetensors", "trained.safetensors"):
        with safe_open(folder / file, "pt") as tensors:
            names[file] = set(tensors.keys())
    assert all(
        name.startswith("base_model.model.language_model.") and name.endswith(("lora_A.weight", "lora_B.weight"))
        for name in names["adapter_model.safetensors"]
    )
    assert names["trained.safetensors"] == {
        f"connector.projection.{name}"
        for name in ("gate.weight", "up_proj", "up_proj_bias", "down_proj", "down_proj_bias")
    }


def test_loaded_it_is_the_trained_model(trained):
    folder, _, logits = trained
    model = CuMoForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        assert relative_error(model(**batch(CuMoProcessor.from_pretrained(folder))).logits, logits) <= 1e-5


@pytest.mark.parametrize("named", [True, False], ids=["base-of-the-adapter", "base-as-argument"])
def test_merged_it_is_the_trained_model(trained, sparse, tmp_path, named):
    folder, _, logits = trained
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    target = tmp_path / "merged"
    options = [] if named else ["--base", sparse]
    convert.run(parser.parse_args([str(folder), str(target), "--merge-lora", *options]))
    assert not is_adapter(target) and not (target / "adapter_config.json").exists()
    model = CuMoForConditionalGeneration.from_pretrained(target)
    with torch.no_grad():
        assert relative_error(model(**batch(CuMoProcessor.from_pretrained(target))).logits, logits) <= 1e-5


def test_merging_what_is_no_adapter(sparse, tmp_path):
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    with pytest.raises(ValueError, match="source: expected a folder with adapter_config.json for --merge-lora"):
        convert.run(parser.parse_args([sparse, str(tmp_path / "merged"), "--merge-lora"]))


def test_going_on_bit_for_bit(trained, sparse, data, tmp_path):
    """Dropout of the adapters included."""
    folder, _, _ = trained
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runs = []
        for name, stop in (("whole", None), ("stopped", 4)):
            options = {"steps": 8, "checkpoint": {"save_steps": 4, "total_limit": 9}}
            recipe = Recipe.from_dict(lora_recipe(tmp_path / name, sparse, data, **options))
            run_stage(recipe)
            if stop:
                for path in ("final", "checkpoint-8"):
                    (tmp_path / name / path).rename(tmp_path / f"{name}-{path}")
                run_stage(recipe)
            runs.append([(line["loss"], line["grad_norm"]) for line in read_log(tmp_path / name)])
        assert runs[0] == runs[1]
    finally:
        torch.set_num_threads(torch_threads)


def test_an_adapter_is_merged_before_the_next_is_trained(trained, data, tmp_path):
    folder, _, _ = trained
    result = run_stage(Recipe.from_dict(lora_recipe(tmp_path, str(folder), data)))
    assert (tmp_path / "start" / "model.safetensors").is_file()
    assert is_adapter(result.folder)
    CuMoForConditionalGeneration.from_pretrained(result.folder)


def test_routers_and_experts_of_the_language_model_are_left(data, tmp_path):
    start = run_stage(
        Recipe.from_dict(recipe_of(tmp_path / "1", write_parts(tmp_path, "mixtral"), data, stage="pretrain"))
    )
    recipe = Recipe.from_dict(lora_recipe(tmp_path / "2", str(start.folder), data))
    model = load_model(recipe, prepare_start(recipe))
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    text = {name for name in trains if name.startswith("language_model.")}
    assert text and all(".self_attn." in name and "lora_" in name for name in text)


def test_bad_targets(sparse, data, tmp_path):
    recipe = Recipe.from_dict(lora_recipe(tmp_path, sparse, data, lora={**LORA, "targets": ["q_proj", "other"]}))
    with pytest.raises(ValueError, match=r"lora.targets: expected some of .*, got \['other'\]"):
        load_model(recipe, prepare_start(recipe))
    recipe = Recipe.from_dict(lora_recipe(tmp_path, sparse, data, lora={**LORA, "targets": ["q_proj", "v_proj"]}))
    model = load_model(recipe, prepare_start(recipe))
    assert {name.split(".lora_")[0].rpartition(".")[2] for name, _ in model.named_parameters() if "lora_" in name} == {
        "q_proj",
        "v_proj",
    }


def test_without_the_base(trained, tmp_path):
    folder, _, _ = trained
    with pytest.raises(ValueError, match="model_base: expected the folder of the model that .* builds on"):
        CuMoForConditionalGeneration.from_pretrained(folder, model_base=tmp_path)


@pytest.mark.slow
def test_two_processes(sparse, data, tmp_path):
    options = {"lora": {**LORA, "dropout": 0.0}, "data": {"group_by_modality_length": False}}
    one = lora_recipe(tmp_path / "one", sparse, data, **options)
    run_stage(Recipe.from_dict(one))
    two = lora_recipe(
        tmp_path / "two", sparse, data, **options, distributed="fsdp2", batch={"per_device_batch_size": 2}
    )
    train_in_processes(write_recipe(tmp_path / "recipe.yaml", two))
    for line, other in zip(read_log(tmp_path / "two"), read_log(tmp_path / "one"), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
    models = [CuMoForConditionalGeneration.from_pretrained(tmp_path / run / "final") for run in ("one", "two")]
    inputs = batch(CuMoProcessor.from_pretrained(tmp_path / "two" / "final"))
    with torch.no_grad():
        logits = [model(**inputs).logits for model in models]
    assert relative_error(logits[1], logits[0]) <= 1e-4


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="QLoRA needs bitsandbytes")
def test_qlora(sparse, data, tmp_path):
    recipe = Recipe.from_dict(lora_recipe(tmp_path, sparse, data, lora={**LORA, "bits": 4}, precision="bf16"))
    result = run_stage(recipe)
    assert is_adapter(result.folder) and result.steps == 4
    model = load_model(recipe, Path(sparse))
    quantised = {name for name, parameter in model.named_parameters() if type(parameter).__name__ == "Params4bit"}
    assert quantised == {name for name, _ in model.named_parameters() if name.endswith(".base_layer.weight")}
    for name, parameter in model.named_parameters():
        if name.startswith(("connector.", "vision_tower.")):
            expected = torch.float32 if parameter.requires_grad else torch.bfloat16
            assert parameter.dtype == expected, name


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is there")
def test_qlora_without_bitsandbytes(sparse, data, tmp_path):
    with pytest.raises(ValueError, match="lora.bits: expected null, as bitsandbytes is not installed"):
        run_stage(Recipe.from_dict(lora_recipe(tmp_path, sparse, data, lora={**LORA, "bits": 4})))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "ernie4_5_moe"])
def test_qlora_of_stacked_experts(family, sparse, data, tmp_path):
    """Which bitsandbytes leaves as they are, under whatever name a configuration counts them."""
    counts = {"moe_num_experts" if family == "ernie4_5_moe" else "num_experts": 4, "moe_intermediate_size": 16}
    tiny_model(text_type=family, text=counts).save_pretrained(tmp_path / "model")
    recipe = Recipe.from_dict(lora_recipe(tmp_path, sparse, data, lora={**LORA, "bits": 4}))
    with pytest.raises(ValueError, match=rf"lora.bits: expected a language model of linear layers, got {family} with"):
        load_model(recipe, tmp_path / "model")
