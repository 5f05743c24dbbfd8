# SPDX-License-Identifier: Apache-2.0
"""A tiny random model with the tokenizer of Mistral, and things to ask it."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cumo import CuMoConfig, CuMoForConditionalGeneration, CuMoProcessor
from cumo.models.processor import clip_image_processor
from cumo.models.tokenizer import mistral_tokenizer


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
