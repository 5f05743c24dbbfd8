# SPDX-License-Identifier: Apache-2.0
"""The parameters of a model by part, frozen or with a learning rate."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from cumo.train.recipe import Train

PARTS = ("vision", "connector", "text", "routers")
_PREFIXES = {"vision_tower.": "vision", "connector.": "connector", "language_model.": "text"}
_WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
# `gate` is the router's name in MoEMLP and in the MoE layers of transformers, whose dense layers have a `gate_proj`
_ROUTER = re.compile(r"(^|\.)(gate|router)\.(weight|bias|e_score_correction_bias)$")


def home_of(name: str) -> str:
    """vision, connector or text: where a parameter lies.

    Raises:
        ValueError: `name` is that of no parameter of a CuMo model.
    """
    for prefix, part in _PREFIXES.items():
        if name.startswith(prefix):
            return part
    raise ValueError(f"{name}: expected the name of a parameter in {list(_PREFIXES)}")


def part_of(name: str) -> str:
    """vision, connector, text or, wherever it lies, routers: by what a parameter's training is ruled."""
    return "routers" if _ROUTER.search(name) else home_of(name)


def setting_of(name: str, train: Train) -> bool | float:
    """Whether a parameter trains, or its learning rate."""
    value: bool | float | None = getattr(train, part_of(name))
    if value is None:
        value = getattr(train, home_of(name))
    assert value is not None
    return value


def freeze(model: Any, train: Train, *, adapters: bool = False) -> None:
    """Set `requires_grad` of every parameter.

    No module has dropout, so frozen modules need not be put in eval mode.

    Args:
        model: a CuMo model.
        train: what trains.
        adapters: of the language model only adapters train, and its routers not at all.
    """
    unused = {id(parameter) for parameter in model.vision_tower.unused_parameters()}
    for name, parameter in model.named_parameters():
        trains = bool(setting_of(name, train)) and id(parameter) not in unused
        if adapters and home_of(name) == "text":
            trains = "lora_" in name
        if parameter.is_floating_point():
            parameter.requires_grad_(trains)


def set_dtypes(model: nn.Module, frozen: torch.dtype) -> None:
    """Parameters that train in float32, where steps are not lost to rounding; the others as `frozen`."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        elif parameter.is_floating_point():
            parameter.data = parameter.data.to(frozen)


def groups_of(
    named: Iterable[tuple[str, nn.Parameter]], train: Train, lr: float, weight_decay: float, decayed: Iterable[str]
) -> list[dict[str, Any]]:
    """Groups of an optimizer: for each part, what has weight decay and what has none.

    Args:
        named: parameters with their names in the model.
        train: learning rates.
        lr: where `train` says true.
        weight_decay: of the parameters in `decayed`.
        decayed: names.

    Returns:
        Groups with `params`, `lr`, `weight_decay` and `name`, the part.
    """
    decayed = set(decayed)
    groups: dict[tuple[str, float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        name = clean(name)
        setting = setting_of(name, train)
        rate = lr if isinstance(setting, bool) else float(setting)
        decay = weight_decay if name in decayed else 0.0
        groups.setdefault((part_of(name), rate, decay), []).append(parameter)
    order = sorted(groups, key=lambda key: (PARTS.index(key[0]), key[1], -key[2]))
    return [{"params": groups[key], "lr": key[1], "weight_decay": key[2], "name": key[0]} for key in order]


def clean(name: str) -> str:
    """A parameter's name without what wrappers put in."""
    return ".".join(step for step in name.split(".") if step not in _WRAPPERS)


def summary(model: nn.Module) -> Iterator[tuple[str, int, int]]:
    """(part, parameters, those that train) of a model."""
    totals: dict[str, list[int]] = {part: [0, 0] for part in PARTS}
    for name, parameter in model.named_parameters():
        size = parameter.numel()
        totals[part_of(clean(name))][0] += size
        totals[part_of(clean(name))][1] += size if parameter.requires_grad else 0
    return ((part, total, trains) for part, (total, trains) in totals.items())
