# SPDX-License-Identifier: Apache-2.0
"""Quantised weights through bitsandbytes: what of a model is quantised, and what keeps its precision."""

from __future__ import annotations

import importlib.util

import torch
from transformers import BitsAndBytesConfig

from cumo.config import EXPERT_COUNTS, CuMoConfig

QUANTIZATIONS = ("int8", "nf4")
# What keeps its precision, as regular expressions: routers decide between experts that are close to each other, and
# vision and connector are small beside the language model.
NOT_QUANTIZED = [
    "vision_tower",
    "connector",
    "lm_head",
    r".*\.(gate|router|shared_expert_gate)(\..*)?$",
]


def quantization_config(kind: str, compute_dtype: torch.dtype = torch.bfloat16) -> BitsAndBytesConfig:
    """transformers' configuration of quantised weights, which leaves the modules of `NOT_QUANTIZED` alone.

    Args:
        kind: "int8" (LLM.int8) or "nf4" (4 bits, with the scales quantised again).
        compute_dtype: dtype in which 4-bit layers multiply.

    Raises:
        ValueError: `kind` is none of `QUANTIZATIONS`.
        ImportError: bitsandbytes or accelerate is not installed.
    """
    if kind not in QUANTIZATIONS:
        raise ValueError(f"quantization: expected one of {list(QUANTIZATIONS)} or None, got {kind!r}")
    for package in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"quantization: {kind!r} needs the package {package}, which is not installed")
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=NOT_QUANTIZED)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=NOT_QUANTIZED,
    )


def check_quantizable(argument: str, config: CuMoConfig) -> None:
    """Raise for a language model whose experts are stacked tensors, of which bitsandbytes would quantise nothing.

    Args:
        argument: what the error calls the wish to quantise.
        config: of the whole model.

    Raises:
        ValueError: the language model has experts.
    """
    text = config.text_config
    for name in EXPERT_COUNTS:
        count = getattr(text, name, None) or 1
        if count > 1:
            raise ValueError(
                f"{argument}: expected a language model of linear layers, got {text.model_type} with {name}={count}: "
                "bitsandbytes does not quantise stacked experts"
            )
