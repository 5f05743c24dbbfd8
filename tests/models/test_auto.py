# SPDX-License-Identifier: Apache-2.0
"""After `import cumo` the doors of transformers open: Auto classes, and its own pipeline."""

import subprocess
import sys

import pytest

pytest.importorskip("transformers", reason="CuMo is built on transformers")

from cumo.inference import CuMoPipeline, GenerationOptions
from tests.inference.tiny import ask, picture, save_model

SCRIPT = """
import sys, warnings
import cumo
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, pipeline

folder, image = sys.argv[1:]
assert type(AutoConfig.from_pretrained(folder)) is cumo.CuMoConfig
assert type(AutoModelForImageTextToText.from_pretrained(folder)) is cumo.CuMoForConditionalGeneration
assert type(AutoProcessor.from_pretrained(folder)) is cumo.CuMoProcessor
answer = pipeline("image-text-to-text", model=folder, device="cpu")
parts = [{"type": "image", "url": image}, {"type": "text", "text": "What is this?"}]
(found,) = answer(text=[{"role": "user", "content": parts}], max_new_tokens=6, return_full_text=False, do_sample=False)
print(found["generated_text"])
"""


@pytest.mark.slow
def test_the_pipeline_of_transformers_says_what_ours_says(tmp_path):
    """In a process of its own, which knows nothing of CuMo before the import."""
    save_model(tmp_path / "model")
    picture(0).save(tmp_path / "picture.png")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "model"), str(tmp_path / "picture.png")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    ours = CuMoPipeline.from_pretrained(tmp_path / "model", device="cpu")
    (expected,) = ours.generate([ask(picture(0), "What is this?")], GenerationOptions(max_new_tokens=6))
    assert result.stdout.strip() == expected.text.strip()
