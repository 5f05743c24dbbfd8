# SPDX-License-Identifier: Apache-2.0
"""Models and processors from a folder or the hub, also with quantised weights."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from cumo.config import HUB_OPTIONS, CuMoConfig
from cumo.models.cumo import CuMoForConditionalGeneration
from cumo.models.processor import CuMoProcessor
from cumo.models.quantization import check_quantizable, quantization_config

DTYPES = ("auto", "float32", "bfloat16", "float16")
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def resolve_dtype(dtype: str | torch.dtype) -> Any:
    """What `from_pretrained` takes; "auto" is the dtype of the checkpoint.

    Raises:
        ValueError: `dtype` is none of `DTYPES`.
    """
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {list(DTYPES)}, got {dtype!r}")
    return dtype if dtype == "auto" else getattr(torch, dtype)


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device of that name; for None the first GPU, or the CPU of a machine without one.

    Raises:
        ValueError: `device` names no device, or a GPU where PyTorch finds none.
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


def load(
    name: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    quantization: str | None = None,
    **options: Any,
) -> tuple[CuMoForConditionalGeneration, CuMoProcessor]:
    """A model, ready to answer, and its processor.

    The arguments and what is raised are those of `CuMoPipeline.from_pretrained`.
    """
    hub = {key: value for key, value in options.items() if key in HUB_OPTIONS and key != "force_download"}
    wanted, place = resolve_dtype(dtype), resolve_device(device)
    if not Path(name).is_dir() and not _HUB_NAME.fullmatch(str(name)):
        raise ValueError(f"name: expected a folder, or a model of the hub as owner/name, got {str(name)!r}")
    if quantization is not None:
        check_quantizable("quantization", CuMoConfig.from_pretrained(name, **hub))
        compute = torch.bfloat16 if wanted == "auto" else wanted
        options["quantization_config"] = quantization_config(quantization, compute)
        options.setdefault("device_map", {"": str(place)})
    processor = CuMoProcessor.from_pretrained(name, **hub)
    model = CuMoForConditionalGeneration.from_pretrained(name, dtype=wanted, **options)
    if "device_map" not in options:
        model = model.to(place)
    return model.eval(), processor
