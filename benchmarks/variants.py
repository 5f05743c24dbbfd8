# SPDX-License-Identifier: Apache-2.0
"""Variants: each prepares a call from inputs, and only the call is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from benchmarks.workloads import LayerInputs


class MissingVariantError(Exception):
    """A variant cannot run here or does not compute such a layer; the message says why."""


@dataclass(frozen=True)
class Call:
    """A function to time: `run` is the forward; the backward computes the gradients of `leaves` from a cotangent."""

    run: Callable[[], Tensor]
    leaves: list[Tensor]
    cotangent: Tensor | None = None
    """Of the output's shape; None for random numbers."""


Layer = Callable[[LayerInputs], Tensor]
Prepare = Callable[[LayerInputs], Call]


@dataclass(frozen=True)
class Variant:
    """One way to compute an operation."""

    prepare: Prepare
    """Raises `MissingVariantError`, here or when the call runs."""
    kind: str = "baseline"
    """ours, baseline, peer, or bound, which does less work and which no variant is expected to beat."""
    exact: Prepare | None = None
    """Compared with this in float64, in place of the reference of the operation."""


def of_layer(function: Layer) -> Prepare:
    """The call of a layer whose inputs need no preparation."""
    return lambda inputs: Call(lambda: function(inputs), inputs.leaves, inputs.dy_TO)
