# SPDX-License-Identifier: Apache-2.0
"""Recipes in files: YAML, with `key=value` in place of what it says, and those that come with the package."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from cumo.data.yaml_text import parse_yaml, shown
from cumo.train.fields import merged
from cumo.train.recipe import Recipe


def shipped() -> dict[str, Path]:
    """Recipes of the package, such as mistral-7b/pretrain, and their files."""
    root = Path(str(resources.files("cumo.train") / "recipes"))
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.glob("*/*.yaml"))}


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """A recipe of a file.

    Args:
        path: a YAML file, or the name of a recipe of the package, such as "mistral-7b/pretrain".
        overrides: "key=value", where key is a path such as optimizer.lr, and value is YAML.

    Raises:
        ValueError: there is no such recipe, it is no YAML, or it does not fit; names the key.
    """
    values = read(path)
    for override in overrides:
        values = merged(values, _parse(override))
    try:
        return Recipe.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read(path: str | Path) -> dict[str, Any]:
    """The mapping of a recipe's file, as it stands there."""
    file = Path(path)
    if not os.path.isfile(file):
        known = shipped()
        if str(path) not in known:
            raise ValueError(f"{path}: expected a YAML file or one of {list(known)}")
        file = known[str(path)]
    values = parse_yaml(file.read_bytes(), str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected keys and values, got {shown(values)}")
    return values


def _parse(override: str) -> dict[str, Any]:
    """`a.b=1` -> {"a": {"b": 1}}."""
    path, found, text = override.partition("=")
    if not found or not all(path.split(".")):
        raise ValueError(f"{override[:200]}: expected key=value, such as optimizer.lr=1e-3")
    value = parse_yaml(text, override[:200], "YAML behind the equals sign")
    for key in reversed(path.split(".")):
        value = {key: value}
    return dict(value)


def dump(recipe: Recipe) -> str:
    """A recipe as YAML, with every default."""
    import yaml

    return str(yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True))
