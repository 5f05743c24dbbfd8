# SPDX-License-Identifier: Apache-2.0
"""The wheel holds the packages and nothing else, and works away from its source; an sdist holds the rest too."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("cumo", "cumo_kernels")
TREES = (*PACKAGES, "benchmarks", "docs", "examples", "tests")
BUILD = """
import sys
from setuptools import build_meta
target = sys.argv[1]  # the builds change the list
build_meta.build_sdist(target)
build_meta.build_wheel(target)
"""
# Resources are found, and commands start, wherever the packages lie.
USE = """
import cumo, cumo_kernels, importlib.metadata, torch
from cumo.nn import MoEMLP
y, routing = MoEMLP(d_in=8, d_hidden=16, num_experts=4, top_k=2)(torch.randn(2, 3, 8))
assert y.shape == (2, 3, 8)
from cumo.train import load_recipe, shipped
assert [load_recipe(name) for name in shipped()]
from importlib.resources import files
assert all(files("cumo.serve").joinpath("page", name).is_file() for name in ("index.html", "app.js", "page.css"))
assert files("cumo.demo").joinpath("report.html").is_file()
assert files("cumo_kernels").joinpath("tuned_tiles.json").is_file()
print(cumo.__file__, cumo_kernels.__file__, sep="\\n")
"""

pytestmark = pytest.mark.slow


def files_below(root, trees):
    """Names of the files of the trees, without what Python leaves there."""
    paths = (path for tree in trees for path in (root / tree).rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix() for path in paths if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of an sdist and a wheel, built from a copy."""
    pytest.importorskip("setuptools", minversion="77", reason="what builds the package")
    source, target = (tmp_path_factory.mktemp(name) for name in ("source", "dist"))
    for path in ROOT.iterdir():
        if path.name in TREES:
            shutil.copytree(path, source / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.is_file():
            shutil.copy(path, source)
    subprocess.run([sys.executable, "-c", BUILD, target], cwd=source, check=True, capture_output=True)
    return target


@pytest.fixture(scope="module")
def wheel(built):
    """Its path."""
    (path,) = built.glob("*.whl")
    return path


def test_the_wheel_holds_the_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == files_below(ROOT, PACKAGES)


def test_the_sdist_holds_all_that_make_needs(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert files_below(ROOT, TREES) <= names
    assert {"Makefile", "README.md", "CHANGELOG.md", "LICENSE", "constraints.txt", "constraints-oldest.txt"} <= names


def test_the_wheel_works_away_from_its_source(wheel, tmp_path):
    pytest.importorskip("transformers", reason="recipes are read with the packages of the extra `transformers`")
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", site, wheel],
        check=True,
    )
    environment = os.environ | {"PYTHONPATH": str(site)}
    used = subprocess.run([sys.executable, "-c", USE], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert used.returncode == 0, used.stderr
    assert all(line.startswith(str(site)) for line in used.stdout.splitlines())
    command = [sys.executable, "-m", "cumo", "train", "--list"]
    listed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "mistral-7b/pretrain" in listed.stdout, listed.stderr
