# SPDX-License-Identifier: Apache-2.0
"""docs/training.md names every key of a recipe, and none that does not exist."""

import dataclasses
import re
import typing
from pathlib import Path

import pytest
import yaml

from cumo.models.prompts import TEMPLATES
from cumo.train import Recipe, load_recipe, shipped

TEXT = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
ROWS = dict(
    re.findall(r"^\| (`[^|]*`) \|(.*)\|$", TEXT.partition("## Keys of a recipe")[2].partition("## What is")[0], re.M)
)


def inner(kind):
    """The dataclass of a field, if it is one or may be one."""
    return next((option for option in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(option)), None)


def test_every_key_has_a_row():
    named = {name for row in ROWS for name in re.findall(r"`([a-z_.]+)`", row)}
    assert named == {field.name for field in dataclasses.fields(Recipe)} | {"data.packing"}


def test_prompt_templates():
    """All of the package are named, and the one spelled out is a template that a recipe may have."""
    section = TEXT.partition("### Prompt templates")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.M) == list(TEMPLATES)
    (block,) = re.findall(r"```yaml\n(.*?)```", section, re.S)
    own = yaml.safe_load(block)["data"]["template"]
    recipe = Recipe.from_dict(
        {"stage": "finetune", "model": "m", "output_dir": "o", "data": {"path": "p", "template": own}}
    )
    assert dataclasses.replace(recipe.data.template, name="chatml") == TEMPLATES["chatml"]


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Recipe)])
def test_every_key_within_is_named(name):
    kind = inner(typing.get_type_hints(Recipe)[name])
    if kind is None:
        return
    told = "".join(text for row, text in ROWS.items() if f"`{name}" in row)
    for field in dataclasses.fields(kind):
        assert f"`{field.name}`" in told, field.name


def test_overrides_of_the_examples_are_keys():
    for command in re.findall(r"^ *(?:cumo|torchrun).* train .*$", TEXT, re.M):
        named = re.search(r"(?:mistral-7b|mixtral-8x7b)/[a-z-]+", command)
        recipe = load_recipe(named[0] if named and named[0] in shipped() else "mistral-7b/finetune-lora").to_dict()
        for key in re.findall(r" ([a-z_.]+)=", command):
            value = recipe
            for step in key.split("."):
                assert step in value, (key, command)
                value = value[step]


def test_recipes_of_the_text_are_there():
    for name in re.findall(r"`?((?:mistral-7b|mixtral-8x7b)/[a-z-]+)", TEXT):
        assert name in shipped(), name
