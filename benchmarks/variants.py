# SPDX-License-Identifier: Apache-2.0
"""What is timed: a variant prepares a call from inputs, outside of the time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from benchmarks.workloads import LayerInputs


class MissingVariantError(Exception):
    """A variant that cannot run here, or does not compute such a layer; and why."""


@dataclass(frozen=True)
class Call:
    """Something to time: `run` is the forward; the backward is that of `leaves` from a cotangent."""

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
    """ours, baseline, peer, or bound: something that does less, which no variant is expected to beat."""
    exact: Prepare | None = None
    """Held against this in float64, in place of the operation's own reference."""


def of_layer(function: Layer) -> Prepare:
    """A layer as it is."""
    return lambda inputs: Call(lambda: function(inputs), inputs.leaves, inputs.dy_TO)
