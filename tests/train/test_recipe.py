# SPDX-License-Identifier: Apache-2.0
"""Recipes: those of the package, defaults of the stages, overrides, and errors that name the key."""

import pytest
import yaml

from cumo.train import STAGES, Recipe, load_recipe, shipped
from cumo.train.files import dump
from cumo.train.recipe import differences

SMALL = {
    "stage": "instruct",
    "model": "folder",
    "data": {"path": "data.json"},
    "output_dir": "runs/test",
}

OWN_TEMPLATE = (
    "data.template={opening: '', opening_without_system: '', before_user: '', after_user: '', before_answer: '', "
    "after_answer: </s>}"
)


@pytest.mark.parametrize("name", shipped())
def test_recipes_of_the_package(name):
    recipe = load_recipe(name)
    assert recipe.output_dir == f"runs/{name}"
    assert recipe.stage == name.split("/")[1].removesuffix("-lora")
    assert Recipe.from_dict(yaml.safe_load(dump(recipe))) == recipe


def test_a_template_of_a_recipe():
    recipe = load_recipe("mistral-7b/finetune", [OWN_TEMPLATE])
    assert recipe.data.template.after_answer == "</s>"
    assert Recipe.from_dict(yaml.safe_load(dump(recipe))) == recipe
    named = load_recipe("mistral-7b/finetune")
    assert list(differences(named.to_dict(), recipe.to_dict())) == ["data.template"]


def test_the_paper():
    """arXiv 2405.05949, table 6."""
    pretrain, prefinetune, instruct = (load_recipe(f"mistral-7b/{stage}") for stage in list(STAGES)[:3])
    assert [r.optimizer.lr for r in (pretrain, prefinetune, instruct)] == [1e-3, 2e-6, 4e-6]
    assert [r.batch.global_batch_size for r in (pretrain, prefinetune, instruct)] == [256, 128, 256]
    assert load_recipe("mixtral-8x7b/instruct").optimizer.lr == 2e-6
    assert (pretrain.train.vision, pretrain.train.connector, pretrain.train.text) == (False, True, False)
    assert (prefinetune.train.vision, prefinetune.train.connector, prefinetune.train.text) == (True, True, True)
    assert [r.data.template for r in (pretrain, instruct)] == ["plain", "mistral_instruct_system"]
    assert [r.data.image_aspect for r in (pretrain, instruct)] == ["square", "pad"]
    assert instruct.upcycle.experts == {"vision": 4, "connector": 4} and instruct.upcycle.top_k == 2
    assert (instruct.aux.balance, instruct.aux.z) == (0.1, 0.01)
    for recipe in (pretrain, prefinetune, instruct):
        assert (recipe.epochs, recipe.schedule.name, recipe.schedule.warmup) == (1.0, "cosine", 0.03)
        assert (recipe.precision, recipe.optimizer.weight_decay) == ("bf16", 0.0)


def test_passes_follow_from_the_batch_and_the_processes():
    batch = load_recipe("mistral-7b/instruct").batch
    assert [batch.accumulation(processes) for processes in (1, 8, 64)] == [64, 8, 1]
    with pytest.raises(ValueError, match=r"batch.global_batch_size: expected a multiple of 12 \(3 processes x"):
        batch.accumulation(3)


def test_overrides(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    recipe = load_recipe(
        path, ["optimizer.lr=1e-3", "train.vision=false", "upcycle={vision: 4}", "steps=7", "seed=1e1"]
    )
    assert recipe.optimizer.lr == 1e-3 and recipe.train.vision is False and recipe.upcycle.vision == 4
    assert recipe.steps == 7 and recipe.seed == 10
    assert load_recipe(path, ["train.vision=2e-5"]).train.vision == 2e-5
    assert load_recipe(path, ["report_to=[tensorboard, wandb]"]).report_to == ["tensorboard", "wandb"]
    parts = load_recipe(path, ["stage=pretrain", "model={vision: a, text: b}"]).model
    assert (parts.vision, parts.text, parts.scales) == ("a", "b", [1, 3])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "optimizer.lrr: expected one of .*; did you mean lr?"),
        ("optimiser.lr=1", "optimiser: expected one of .*; did you mean optimizer?"),
        ("optimizer.lr=fast", "optimizer.lr: expected a number, got 'fast'"),
        ("optimizer.lr=-1", "optimizer.lr: expected a positive number, got -1.0"),
        ("optimizer.lr=true", "optimizer.lr: expected a number, got True"),
        ("optimizer.betas=[0.9]", r"optimizer.betas: expected two numbers in \[0, 1\), got \[0.9\]"),
        ("optimizer.betas=[0.9, x]", r"optimizer.betas\[1\]: expected a number, got 'x'"),
        ("optimizer=3", "optimizer: expected keys and values, got 3"),
        ("steps=1.5", "steps: expected an integer or null, got 1.5"),
        ("steps=0", "steps: expected a positive number, got 0"),
        ("stage=final", "stage: expected one of .*, got 'final'"),
        ("precision=int8", "precision: expected one of"),
        ("data.template=vicuna", "data.template: expected one of"),
        ("data.template=1", "data.template: expected a string or keys and values, got 1"),
        ("data.template={opening: q}", "data.template.opening_without_system: expected a value, got none"),
        (
            OWN_TEMPLATE.replace("after_user: ''", "after_user: '{system}'"),
            "data.template.after_user: expected no {s",
        ),
        ("data.image_aspect=anyres", "data.image_aspect: expected one of"),
        ("data.on_bad_sample=ignore", "data.on_bad_sample: expected one of"),
        ("data.path=null", "data.path: expected a string, got None"),
        ("data.packing={max_length: 100}", "data.packing.max_length: expected at least data.max_length=4096, got 100"),
        ("train.vision=0.0", "train.vision: expected true, false or a positive learning rate, got 0.0"),
        ("train={vision: false, connector: false, text: false}", "train: expected something to train"),
        ("upcycle={vision: 1}", "upcycle.vision: expected two experts or more, got 1"),
        ("upcycle={}", "upcycle.experts: expected a number for"),
        ("aux.mode=none", "aux.mode: expected one of"),
        ("aux.balance=-1", "aux.balance: expected a number >= 0"),
        ("batch.per_device_batch_size=0", "batch.per_device_batch_size: expected a positive number, got 0"),
        ("checkpoint.total_limit=0", "checkpoint.total_limit: expected a positive number, got 0"),
        ("lora={rank: 0}", "lora.rank: expected a positive number"),
        ("lora={bits: 8}", "lora.bits: expected 4 or null, got 8"),
        ("distributed=zero3", "distributed: expected ddp, fsdp2 or a DeepSpeed .json, got 'zero3'"),
        ("model={vision: a}", "model.text: expected a value, got none"),
        ("model={vision: a, text: b, connector_type: qformer}", "model.connector_type: expected one of"),
        ("model=3", "model: expected a string or keys and values, got 3"),
        ("optimizer.lr", "optimizer.lr: expected key=value"),
        ("optimizer.lr=[", "expected YAML behind the equals sign"),
        ("=3", "=3: expected key=value"),
    ],
)
def test_errors_name_the_key(tmp_path, override, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    with pytest.raises(ValueError, match=message):
        load_recipe(path, [override])


def test_upcycling_what_has_experts_is_refused_at_the_stage_that_continues():
    with pytest.raises(ValueError, match="upcycle: expected null at stage finetune, which continues"):
        Recipe.from_dict({**SMALL, "stage": "finetune", "upcycle": {"vision": 4}})
    with pytest.raises(ValueError, match="lora: expected train.text on"):
        Recipe.from_dict({**SMALL, "lora": {}, "train": {"text": False}})
    with pytest.raises(ValueError, match="lora.bits: expected distributed: ddp"):
        Recipe.from_dict({**SMALL, "lora": {"bits": 4}, "distributed": "fsdp2"})


def test_what_is_missing(tmp_path):
    for key in ("model", "data", "output_dir"):
        with pytest.raises(ValueError, match=f"{key}.*: expected a value, got none"):
            Recipe.from_dict({name: value for name, value in SMALL.items() if name != key})
    with pytest.raises(ValueError, match="absent.yaml: expected a YAML file or one of"):
        load_recipe(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="expected keys and values"):
        load_recipe(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="broken.yaml: expected YAML"):
        load_recipe(tmp_path / "broken.yaml")


def test_differences():
    one, other = Recipe.from_dict(SMALL), Recipe.from_dict({**SMALL, "optimizer": {"lr": 1.0}, "seed": 1})
    assert differences(one.to_dict(), other.to_dict()) == {"optimizer.lr": (4e-6, 1.0), "seed": (42, 1)}
    assert differences(one.to_dict(), one.to_dict()) == {}
