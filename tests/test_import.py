# SPDX-License-Identifier: Apache-2.0
"""What an import brings along."""

import subprocess
import sys

import pytest

SCRIPT = "import sys, {module}; print(*(name for name in ('transformers', 'triton') if name in sys.modules))"


@pytest.mark.parametrize("module", ["cumo", "cumo.nn", "cumo.checkpoints.published"])
def test_transformers_is_not_imported_until_used(module):
    command = [sys.executable, "-c", SCRIPT.format(module=module)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "transformers" not in result.stdout.split()


def test_every_public_name_can_be_imported():
    pytest.importorskip("transformers", reason="the models are built on transformers")
    import cumo

    for name in cumo.__all__:
        assert getattr(cumo, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        cumo.Nothing  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CuMoConfig", "CuMoForConditionalGeneration", "CuMoProcessor", "CuMoVisionModel"])
def test_every_name_can_be_the_first_that_is_imported(name):
    """The Auto classes of transformers import our models while one of them imports the Auto classes."""
    pytest.importorskip("transformers")
    code = (
        f"from cumo import {name}, CuMoConfig; from transformers import AutoModelForImageTextToText as auto; "
        "assert CuMoConfig in auto._model_mapping"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_transformers_can_be_used_where_the_models_cannot():
    """As with a transformers older than ours, or without Pillow: the layers alone do not need them."""
    pytest.importorskip("transformers")
    code = (
        "import sys; sys.modules['PIL'] = None; from cumo.nn import MoEMLP; "
        "from transformers import AutoConfig, AutoModel, AutoProcessor; AutoConfig.for_model('llama')"
    )
    result = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "transformers' Auto classes do not know CuMo" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("absent", "arguments", "extra"),
    [
        ("safetensors", ["convert", "--help"], "transformers"),
        ("fastapi", ["serve", "/absent"], "serve"),
        ("sklearn", ["demo", "--quick"], "demo"),
    ],
)
def test_a_command_says_at_once_what_is_not_installed(absent, arguments, extra, tmp_path):
    code = f"import sys; sys.modules[{absent!r}] = None; from cumo.cli import main; sys.exit(main())"
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    command = arguments[0]
    assert result.returncode == 2
    hint = f"the extra {extra!r} brings it: pip install '.[{extra}]' in the sources of cumo"
    assert result.stderr == f"cumo {command}: error: {absent} is not installed; {hint}\n"
