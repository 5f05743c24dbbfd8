# SPDX-License-Identifier: Apache-2.0
"""A tiny random model with the tokenizer of Mistral, and things to ask it.

A `conftest.py` that imports the fixtures offers them to its folder.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cumo import CuMoConfig, CuMoForConditionalGeneration, CuMoProcessor
from cumo.inference import CuMoPipeline
from cumo.models.processor import clip_image_processor
from cumo.models.tokenizer import mistral_tokenizer
from tests.models.tiny import tiny_model


def tokenizer_model() -> Path:
    """The tokenizer.model of Mistral, which comes with mistral_common."""
    spec = find_spec("mistral_common")
    if spec is None or spec.origin is None:
        pytest.skip("the tokenizer.model of Mistral comes with mistral_common, which is not installed")
    return Path(spec.origin).parent / "data" / "tokenizer.model.v1"


def save_model(path: Path) -> None:
    """A checkpoint with its processor."""
    torch.manual_seed(0)
    config = CuMoConfig.from_preset("tiny")
    config.text_config.initializer_range = 0.5  # logits far apart, so that rounding cannot change which is the largest
    model = CuMoForConditionalGeneration(config)
    vision = config.vision_config
    processor = CuMoProcessor(
        clip_image_processor(vision.encoder_config.image_size),
        mistral_tokenizer(tokenizer_model()),
        image_seq_length=vision.num_patches,
    )
    model.save_pretrained(path)
    processor.save_pretrained(path)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A checkpoint with its processor."""
    path = tmp_path_factory.mktemp("model")
    save_model(path)
    return path


@pytest.fixture(scope="session")
def pipeline(folder):
    """Loaded from the folder."""
    return CuMoPipeline.from_pretrained(folder, device="cpu")


def dense_pipeline(pipeline, **vision) -> CuMoPipeline:
    """The same without experts; `vision` changes its encoder's configuration."""
    model = tiny_model(
        text_type="mistral",
        text={"vocab_size": 32000},
        vision={"num_experts": 1, "num_experts_per_tok": 1, **vision},
        connector_num_experts=1,
        connector_num_experts_per_tok=1,
    )
    processor = type(pipeline.processor)(
        type(pipeline.processor.image_processor)(
            size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12}, do_pad=True
        ),
        pipeline.processor.tokenizer,
        image_seq_length=9,
        high_resolution_size=24 if vision.get("high_resolution") else None,
    )
    return CuMoPipeline(model, processor)


def picture(seed: int = 0, height: int = 20, width: int = 30) -> Image.Image:
    """A picture of noise, the same for the same seed."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def ask(*parts, system=None):
    """A conversation of one question: strings, and pictures."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    messages = [{"role": "user", "content": content}]
    return messages if system is None else [{"role": "system", "content": system}, *messages]
