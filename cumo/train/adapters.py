# SPDX-License-Identifier: Apache-2.0
"""LoRA and QLoRA on the language model, through PEFT; encoder, connector and routers are left as they are."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cumo.checkpoints.lora import read_adapter, write_adapter
from cumo.models.quantization import quantization_config
from cumo.train.recipe import Lora

NAME = "default"


def quantization(lora: Lora, compute: torch.dtype) -> Any:
    """The configuration that puts linear layers of the language model into 4 bits; None without `lora.bits`.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    if lora.bits is None:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("lora.bits: expected null, as bitsandbytes is not installed")
    return quantization_config("nf4", compute)


def add_adapters(model: Any, lora: Lora, base: str) -> None:
    """Put adapters into the language model's linear layers.

    Args:
        model: a CuMo model.
        lora: rank and the like.
        base: folder that the adapters will name as theirs.

    Raises:
        ValueError: `lora.targets` names no layer.
    """
    from peft import LoraConfig

    layers = _linear_layers(model)
    names = sorted(layers) if lora.targets is None else lora.targets
    if unknown := sorted(set(names) - set(layers)) or (not names and ["none"]):
        raise ValueError(f"lora.targets: expected some of {sorted(layers)}, got {unknown}")
    model.add_adapter(
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=rf"language_model\..*\.({'|'.join(names)})",
        ),
        adapter_name=NAME,
    )
    model.peft_config[NAME].base_model_name_or_path = base


def _linear_layers(model: Any) -> set[str]:
    """Last names of the language model's linear layers but the output embedding and the routers."""
    head = model.language_model.get_output_embeddings()
    return {
        name.rpartition(".")[2]
        for name, module in model.language_model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and not name.endswith((".gate", ".router"))
    }


def save(folder: Path, model: Any, tensors: dict[str, Tensor] | None = None) -> None:
    """Write into an existing folder what trains, and the configuration.

    Args:
        folder: where to.
        model: with adapters.
        tensors: of the model, where it holds parts of them only.
    """
    state = dict(model.named_parameters()) if tensors is None else tensors
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    write_adapter(folder, {name: state[name] for name in state if name in trains}, model.peft_config[NAME])
    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


def load(folder: Path, model: Any) -> None:
    """The inverse of `save`, into a model with the same adapters.

    Raises:
        ValueError: `folder` holds other parameters than those of `model` that train.
    """
    tensors = read_adapter(folder)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if tensors.keys() != parameters.keys():
        raise ValueError(
            f"{folder}: expected the parameters that train, missing {sorted(parameters.keys() - tensors.keys())}, "
            f"unexpected {sorted(tensors.keys() - parameters.keys())}"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
