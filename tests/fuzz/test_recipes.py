# SPDX-License-Identifier: Apache-2.0
"""Recipes of any bytes: a recipe that can be written and read again, or exit code 2 and a sentence."""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from hypothesis import given

from cumo.cli import main
from cumo.train.files import dump, load_recipe, read, shipped
from tests.fuzz.mutate import HOSTILE, RANDOM, as_json, cases, damaged, mutated

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{below}'] * 9)}]\n" for below, name in zip("abcdefgh", "bcdefghi", strict=True)
)
TEXTS = (
    BOMB,
    "a: &a [*a]\n",
    "a: &a {b: *a}\n",
    "<<: &a {stage: instruct}\n<<: *a\n",
    "stage: instruct\nstage: pretrain\n",
    "stage: 2020-99-99\n",
    "stage: !!timestamp x\n",
    "stage: !!int ''\n",
    "stage: !!float ''\n",
    "stage: !!binary '*'\n",
    "stage: !!python/object/apply:os.system [x]\n",
    "stage: !!set [a]\n",
    "stage: !!omap a\n",
    "? [a, b]\n: c\n",
    "? {a: b}\n: c\n",
    "\tstage: x\n",
    "stage: =\n",
    "stage: 1:99:99\n",
    "--- a\n--- b\n",
    "[" * 3000,
    "{a: " * 3000,
    "- " * 3000,
    "stage: *x\n",
    "stage: " + "9" * 5000 + "\n",
    "stage: 0x\n",
    "stage: 1e999999\n",
    "%YAML 9.9\n---\na: b\n",
    "stage: 'x",
    "trainer: &t {a: *t}\n",
)
ERROR = "cumo train: error: "


def run(*words: str) -> tuple[int, str, str]:
    """Exit code, output and errors of `cumo train`."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = main(["train", *words])
        except SystemExit as left:
            code = int(left.code or 0)
    return code, out.getvalue(), err.getvalue()


def check(path: Path, *overrides: str) -> None:
    """Print the recipe, or say what is wrong with it."""
    code, out, err = run(str(path), *overrides, "--print")
    if code == 0:
        assert load_recipe(path, overrides).to_dict() == yaml.safe_load(out)
        return
    assert code == 2, err
    assert ERROR in err and "Traceback" not in err
    assert len(err) < 5000, len(err)


def check_recipe(random: Random) -> None:
    """A shipped recipe, mutated."""
    known = shipped()
    values: Any = read(random.choice([*known]))
    values = mutated({**values, "lora": {"rank": 4, "targets": ["q"]}, "trainer": {"optim": "x"}}, random)
    if random.randrange(2):
        raw = as_json(values, random)
    else:
        raw = yaml.safe_dump(values, allow_unicode=True).encode("utf-8", "surrogatepass")
        kind = random.randrange(6)
        if kind == 0:
            raw = damaged(raw, random)
        elif kind == 1:
            raw += random.choice(TEXTS).encode()
        elif kind == 2:
            lines = raw.split(b"\n")
            at = random.randrange(len(lines))
            lines.insert(at, random.choice([b"\t", b" ", lines[at], b"\xff", b"- a", b"stage: &x [*x]"]))
            raw = b"\n".join(lines)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "a recipe.yaml"
        path.write_bytes(raw)
        check(path)


def keys(values: Any, path: str = "") -> list[str]:
    """Paths of all keys, as overrides name them."""
    if not isinstance(values, dict):
        return [path]
    below = [found for key, value in values.items() for found in keys(value, f"{path}.{key}" if path else key)]
    return [*([path] if path else []), *below]


def check_override(random: Random) -> None:
    """A shipped recipe with mutated overrides."""
    name = random.choice([*shipped()])
    recipe = load_recipe(name)
    known = keys(yaml.safe_load(dump(recipe)))
    overrides = []
    for _ in range(random.randint(1, 2)):
        value = random.choice(HOSTILE)
        text = random.choice(TEXTS) if random.randrange(3) == 0 else str(value)[:1000].replace("\ud800", "")
        separator = random.choice(["=", "=", "=", "=", "", ":", "=="])
        overrides.append(random.choice([*known, "", ".", "a..b", "x.y"]) + separator + text)
    overrides = [text for text in overrides if not text.startswith("-")]
    check(Path(name), *overrides)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_traps_of_yaml(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    code, _, err = run(str(path), "--print")
    assert code == 2 and err.startswith(ERROR) and len(err) < 5000
    assert str(path) in err


@cases()
@given(RANDOM)
def test_recipes(random):
    check_recipe(random)


@cases()
@given(RANDOM)
def test_overrides(random):
    check_override(random)
