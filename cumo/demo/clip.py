# SPDX-License-Identifier: Apache-2.0
"""The small CLIP of the demo, trained contrastively on pictures of single digits and their captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from cumo.demo import scenes
from cumo.demo.language import padded
from cumo.demo.settings import Settings
from cumo.demo.training import device, optimise
from cumo.models.processor import clip_image_processor

EMBEDDING = 64
TEXT_TOKENS = 16
LARGEST_LOGIT_SCALE = 4.6  # CLIP's own limit: a temperature of 0.01


def random_pair(digits: scenes.Digits, rng: Generator) -> tuple[scenes.Array, str]:
    """A picture of one digit, in a scene or close up as tiles of larger scales show it, and its caption."""
    scene = scenes.random_scene(rng, most=1)
    if rng.random() < 0.5:
        digit = scene.items[0].digit
        return scenes.draw_close_up(scene.ground, digit, digits.train, rng), f"{scene.ground} ground, {digit}"
    return scenes.draw(scene, digits.train, rng), scenes.caption(scene)


def contrastive_loss(logits: Tensor, captions: list[str]) -> Tensor:
    """CLIP's loss of [pictures, captions]; pictures with one caption are each other's matches too."""
    match = torch.tensor([[one == other for other in captions] for one in captions], device=logits.device).float()
    target = match / match.sum(dim=1, keepdim=True)
    by_picture = -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()
    by_caption = -(target * logits.T.log_softmax(dim=1)).sum(dim=1).mean()
    return (by_picture + by_caption) / 2


def _config(tokenizer: Any, settings: Settings) -> CLIPConfig:
    vision = {
        "hidden_size": settings.vision_width,
        "intermediate_size": settings.vision_hidden,
        "num_hidden_layers": settings.vision_layers,
        "num_attention_heads": 4,
        "image_size": scenes.SIZE,
        "patch_size": settings.patch_size,
        "projection_dim": EMBEDDING,
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": EMBEDDING,
        "intermediate_size": 2 * EMBEDDING,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": TEXT_TOKENS,
        "projection_dim": EMBEDDING,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPConfig(vision_config=vision, text_config=text, projection_dim=EMBEDDING)


def pretrain(folder: Path, digits: scenes.Digits, tokenizer: Any, settings: Settings) -> float:
    """Train a CLIP and write it as transformers does; the final loss.

    Args:
        folder: to write.
        digits: of which those for training are used.
        tokenizer: of the language model, for the captions.
        settings: sizes and steps.
    """
    rng = np.random.default_rng([settings.seed, 2])
    torch.manual_seed(settings.seed)
    model: Any = CLIPModel(_config(tokenizer, settings))
    model.to(device())
    processor = clip_image_processor(scenes.SIZE)

    def loss_of() -> Tensor:
        with torch.no_grad():
            model.logit_scale.clamp_(max=LARGEST_LOGIT_SCALE)
        pictures, captions = zip(*(random_pair(digits, rng) for _ in range(settings.clip_batch)), strict=True)
        rows = [tokenizer(text + tokenizer.eos_token)["input_ids"] for text in captions]
        ids = padded(rows, -1).to(model.device)
        pixels = torch.from_numpy(np.stack(processor(list(pictures))["pixel_values"])).to(model.device)
        output = model(input_ids=ids.clamp(min=0), attention_mask=(ids >= 0).long(), pixel_values=pixels)
        return contrastive_loss(output.logits_per_image, list(captions))

    loss = optimise(model, loss_of, settings.clip_steps, settings.clip_lr, "CLIP")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return loss
