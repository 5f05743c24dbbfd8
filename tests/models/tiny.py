# SPDX-License-Identifier: Apache-2.0
"""A whole model small enough for a test of a moment."""

from __future__ import annotations

from typing import Any

from cumo.config import CuMoConfig
from cumo.models.cumo import CuMoForConditionalGeneration

ENCODER = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 12,
    "patch_size": 4,
}
TEXT = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
PATCHES, IMAGE = 9, 50


def tiny_config(text_type: str = "llama", text: dict[str, Any] | None = None, **changes: Any) -> CuMoConfig:
    """Its configuration; `changes` to that of the whole model or, as `vision`, of the encoder."""
    fields = {**TEXT, **(MIXTRAL if text_type == "mixtral" else {}), "model_type": text_type, **(text or {})}
    vision = {"encoder_config": ENCODER, "scales": [1, 2], **changes.pop("vision", {})}
    return CuMoConfig(vision_config=vision, text_config=fields, **changes)


def tiny_model(**options: Any) -> CuMoForConditionalGeneration:
    """A random one, of the options of `tiny_config`."""
    return CuMoForConditionalGeneration(tiny_config(**options)).eval()
