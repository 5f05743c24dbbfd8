# SPDX-License-Identifier: Apache-2.0
"""Every example in a docstring gives what it says, and what is public has one."""

import doctest
import importlib
import sys
from pathlib import Path

import pytest
import torch

import cumo
import cumo.nn
import cumo_kernels as ck
from tests.documents import example_folder, in_example_folder  # noqa: F401

ROOT = Path(__file__).parents[1]
# What a module outside of `cumo_kernels` and `cumo.nn` may import, and what may be absent.
OPTIONAL = {"PIL", "accelerate", "fastapi", "lmms_eval", "matplotlib", "peft", "transformers", "vlmeval"}


def modules_with_examples():
    """Names of modules whose text has examples. Kernels have none: they cannot be called without a launcher."""
    for package in ("cumo_kernels", "cumo"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            if ">>> " in path.read_text() and not name.startswith("cumo_kernels.kernels"):
                yield name


MODULES = list(modules_with_examples())
OF_THE_LAYER = [name for name in MODULES if name.startswith(("cumo_kernels", "cumo.nn"))]


def check(name):
    """Run the examples of a module."""
    torch.manual_seed(0)
    result = doctest.testmod(importlib.import_module(name), raise_on_error=False)
    assert result.failed == 0
    assert result.attempted > 0


@pytest.mark.parametrize("name", [name for name in MODULES if name not in OF_THE_LAYER])
def test_examples_of_the_model_are_right(name, request):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in OPTIONAL:
            raise
        pytest.skip(f"needs {error.name}")
    if '"checkpoint"' in Path(module.__file__).read_text():
        request.getfixturevalue("in_example_folder")
    check(name)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", OF_THE_LAYER)
def test_examples_of_the_layer_are_right_on_both_backends(name, backend, device):
    if backend == "triton":
        pytest.importorskip("triton", reason="the backend needs Triton")
    with torch.device(device if backend == "triton" else "cpu"), ck.use_backend(backend):
        check(name)


def has_example(thing):
    """Whether an example is found in the docstring of a class or function; its own, not that of a method."""
    (found,) = doctest.DocTestFinder(recurse=False).find(thing, "thing") or [None]
    return found is not None and bool(found.examples)


def test_what_is_public_has_an_example():
    public = {name: getattr(ck, name) for name in ck.__all__} | {
        name: getattr(cumo.nn, name) for name in cumo.nn.__all__
    }
    public["ACTIVATIONS"] = importlib.import_module("cumo_kernels.activations")  # a table is told by its module
    public |= {module: sys.modules[module] for module in ("cumo_kernels", "cumo.nn")}
    public["routing_losses"] = importlib.import_module("cumo.nn.losses").routing_losses
    assert [name for name, thing in public.items() if not has_example(thing)] == []


def test_what_is_public_of_the_model_has_an_example():
    pytest.importorskip("transformers")
    from cumo import inference

    names = ("CuMoPipeline", "GenerationOptions")
    public = {name: getattr(cumo, name) for name in cumo.__all__ if name != "__version__"}
    public |= {name: getattr(inference, name) for name in names}
    assert [name for name, thing in public.items() if not has_example(thing)] == []


def test_a_wrong_example_is_seen(tmp_path, monkeypatch):
    (tmp_path / "wrong_example.py").write_text('"""Adds.\n\n>>> 1 + 1\n3\n"""')
    (tmp_path / "no_example.py").write_text('"""Adds."""')
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("wrong_example", "no_example"):
        with pytest.raises(AssertionError):
            check(name)
        sys.modules.pop(name)


def test_a_missing_example_is_seen():
    def without():
        """None."""

    assert not has_example(without)
    assert has_example(ck.topk_gating)
