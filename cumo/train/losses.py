# SPDX-License-Identifier: Apache-2.0
"""The loss of a step, whatever the passes and processes it is divided among.

A step of the optimizer sees one global batch. Its loss is

    mean over all trained tokens of the cross-entropy
    + balance_loss_coef * (vision + connector balance loss) + that of the language model
    + router_z_loss_coef * (their z-losses) + that of the language model

with the coefficients of `CuMoConfig.router_loss_coefs`,
where the losses of encoder and connector are means over all pictures, and those of the language model over all
positions. Each pass contributes its own means times its share of the trained tokens, pictures and positions, so that
the contributions add up to this loss, and a step comes out the same however it is divided. Two things cannot be
divided so, as they are products of means: the balance loss of an MoE language model, and every balance loss of mode
"switch". For these the step has the average of those of its passes, as in the published training.

What a step of text alone does not use has a gradient of zero rather than none: an optimizer would leave it out, where
moments and weight decay go on if several processes reduce their gradients, or black pictures stand in as published.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from cumo.config import CuMoConfig
from cumo.models.prompts import IGNORE_INDEX

BALANCE, Z = "balance", "z"
PICTURED = ("vision", "connector")
ROUTED = (*PICTURED, "text")
PARTS = ("lm_loss", *(f"{module}_{kind}" for module in ROUTED for kind in (BALANCE, Z)))


class Counts(NamedTuple):
    """Denominators of the means of a pass or a step: int64 scalars on the device."""

    trained: Tensor
    """Tokens that are predicted."""
    images: Tensor
    positions: Tensor
    """Positions of the language model, padding included."""
    tokens: Tensor
    """Positions that are no padding."""


def count(batch: Mapping[str, Any]) -> Counts:
    """Count one pass, which is a batch of the `Collator`."""
    labels: Tensor = batch["labels"]
    pixels = batch.get("pixel_values")
    mask = batch.get("attention_mask")
    positions = torch.tensor(labels.numel(), device=labels.device)
    return Counts(
        trained=labels[:, 1:].ne(IGNORE_INDEX).sum(),
        images=torch.tensor(0 if pixels is None else len(pixels), device=labels.device),
        positions=positions,
        tokens=positions if mask is None else mask.sum(),
    )


def count_step(batches: Iterable[Mapping[str, Any]], device: torch.device) -> Counts:
    """Count all passes of all processes; every process has to call it."""
    total = torch.stack([torch.stack(count(batch)) for batch in batches]).sum(dim=0).to(device)
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(total)
    return Counts(*total.unbind())


def contributions(output: Any, of_pass: Counts, of_step: Counts) -> dict[str, Tensor]:
    """What a pass adds to each part of the loss, unweighted; parts that it has not are absent.

    Args:
        output: a `CuMoOutput` with losses.
        of_pass, of_step: counts of what it was computed from, and of the whole step.
    """
    shares = [mine / all for mine, all in zip(of_pass, of_step, strict=True)]
    share = Counts(*shares)
    parts = {"lm_loss": output["lm_loss"] * share.trained}
    for module, weight in zip(ROUTED, (share.images, share.images, share.positions), strict=True):
        losses = output.get(f"{module}_losses")
        if losses is not None:
            parts[f"{module}_{BALANCE}"] = losses.balance * weight
            parts[f"{module}_{Z}"] = losses.z * weight
    return parts


def weighted(parts: Mapping[str, Any], config: CuMoConfig) -> Any:
    """The loss: the sum of its parts, each with its coefficient of `config.router_loss_coefs`."""
    coefficients = {
        f"{module}_{kind}": coefficient
        for module in ROUTED
        for kind, coefficient in zip((BALANCE, Z), config.router_loss_coefs(module), strict=True)
    }
    return sum(value * coefficients.get(name, 1.0) for name, value in parts.items())


class NonFiniteError(ValueError):
    """A loss or gradient that is no number: training stopped before it reached the weights."""


def check_finite(parts: Mapping[str, Tensor], step: int, places: Callable[[], str]) -> None:
    """Look at the losses of a pass; waits for the device.

    Args:
        parts: as of `contributions`.
        step: of the optimizer, from 1.
        places: says where the samples of the pass are from.

    Raises:
        NonFiniteError: a part is infinite or no number; names it and the samples.
    """
    values = torch.stack([part.detach().float() for part in parts.values()])
    if bool(values.isfinite().all()):
        return
    bad = [f"{name} is {value}" for name, value in zip(parts, values.tolist(), strict=True) if not math.isfinite(value)]
    raise NonFiniteError(f"step {step}: {', '.join(bad)}, in the pass over {places()}")
