# SPDX-License-Identifier: Apache-2.0
"""Models and processors from a folder or the hub, also with quantised weights."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from cumo.config import HUB_OPTIONS, CuMoConfig
from cumo.models.cumo import CuMoForConditionalGeneration
from cumo.models.processor import CuMoProcessor

DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("int8", "nf4")
# What keeps its precision, as regular expressions: routers decide between experts that are close to each other, and
# vision and connector are small beside the language model.
NOT_QUANTIZED = [
    "vision_tower",
    "connector",
    "lm_head",
    r".*\.(gate|router|shared_expert_gate)(\..*)?$",
]

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")  # what configurations of transformers call it


def resolve_dtype(dtype: str | torch.dtype) -> Any:
    """What `from_pretrained` takes; "auto" is the dtype of the checkpoint.

    Raises:
        ValueError: it is none of `DTYPES`.
    """
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {list(DTYPES)}, got {dtype!r}")
    return dtype if dtype == "auto" else getattr(torch, dtype)


def resolve_device(device: str | torch.device | None) -> torch.device:
    """A device; None is the first GPU, or the CPU where there is none.

    Raises:
        ValueError: there is no such device.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: expected a device such as cpu or cuda:0, got {device!r}") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: expected one that is there, got {device!r}, but PyTorch finds no GPU")
    return resolved


def quantization_config(kind: str, compute_dtype: torch.dtype = torch.bfloat16) -> BitsAndBytesConfig:
    """transformers' configuration of quantised weights, which leaves the modules of `NOT_QUANTIZED` alone.

    Args:
        kind: "int8" (LLM.int8) or "nf4" (4 bits, with the scales quantised again).
        compute_dtype: dtype in which 4-bit layers multiply.

    Raises:
        ValueError: the kind is unknown.
        ImportError: bitsandbytes is not installed.
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


def _check_quantizable(name: str | os.PathLike[str], hub: dict[str, Any]) -> None:
    """Raise for a language model whose experts are stacked tensors, of which bitsandbytes would quantise nothing."""
    text_config = CuMoConfig.from_pretrained(name, **hub).text_config
    experts = [field for field in EXPERT_COUNTS if (getattr(text_config, field, None) or 1) > 1]
    if experts:
        raise ValueError(
            f"quantization: expected a language model of linear layers, got {text_config.model_type} with {experts[0]}="
            f"{getattr(text_config, experts[0])}: bitsandbytes does not quantise stacked experts"
        )


def load(
    name: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    quantization: str | None = None,
    **options: Any,
) -> tuple[CuMoForConditionalGeneration, CuMoProcessor]:
    """A model, ready to answer, and its processor; the arguments are those of `CuMoPipeline.from_pretrained`."""
    hub = {key: value for key, value in options.items() if key in HUB_OPTIONS and key != "force_download"}
    wanted, place = resolve_dtype(dtype), resolve_device(device)
    if quantization is not None:
        _check_quantizable(name, hub)
        compute = torch.bfloat16 if wanted == "auto" else wanted
        options["quantization_config"] = quantization_config(quantization, compute)
        options.setdefault("device_map", {"": str(place)})
    processor = CuMoProcessor.from_pretrained(name, **hub)
    model = CuMoForConditionalGeneration.from_pretrained(name, dtype=wanted, **options)
    if "device_map" not in options:
        model = model.to(place)
    return model.eval(), processor
