# SPDX-License-Identifier: Apache-2.0
"""The gate in front of every timing: a variant that is wrong has no time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.variants import Call, Prepare
from benchmarks.workloads import LayerInputs

TOKENS_ON_CUDA, TOKENS_ON_CPU = 16384, 2048  # of which float64 copies fit in memory, and time on a CPU


@dataclass(frozen=True)
class Verdict:
    """How far a variant is off, where it is off most for what is allowed there."""

    error: float
    """Relative, by norms."""
    allowed: float
    """Twice the error of eager PyTorch in the same dtype, and one rounding."""
    worst: str
    """What it is of: output, or the number of a gradient."""

    @property
    def passed(self) -> bool:
        """Whether it may be timed; NaN never."""
        return self.error <= self.allowed


def results_of(call: Call, backward: bool) -> list[Tensor]:
    """Output and, if asked for, gradients from a cotangent that depends on the shape alone."""
    with torch.set_grad_enabled(backward):
        y = call.run()
    if not backward:
        return [y]
    return [y.detach(), *torch.autograd.grad(y, call.leaves, cotangent_of(call, y))]


def cotangent_of(call: Call, y: Tensor) -> Tensor:
    """The one that the call brings, or random numbers."""
    if call.cotangent is not None:
        return call.cotangent
    generator = torch.Generator().manual_seed(2)
    return torch.randn(y.shape, generator=generator).to(y.device, y.dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of what is expected; infinite for another shape."""
    if actual.shape != expected.shape:
        return float("inf")
    expected = expected.double()
    scale = expected.norm().item()
    difference = (actual.double() - expected).norm().item()
    return difference / scale if scale else difference


class Gate:
    """Holds variants of one operation and workload against the float64 reference, at most on its first tokens.

    A variant may be off by twice what the reference itself is off in the dtype that is timed (the rule of QuACK's and
    FlashAttention's tests), for the output and each gradient, and by the dtype's epsilon.
    """

    def __init__(self, exact: Prepare, inputs: LayerInputs, backward: bool) -> None:
        device, segment = inputs.x_TD.device, inputs.workload.case.segment or 1
        tokens = TOKENS_ON_CUDA if device.type == "cuda" else TOKENS_ON_CPU
        self.tokens = min(inputs.x_TD.shape[0], max(tokens // segment, 1) * segment)
        self.inputs, self.backward = inputs.to(inputs.x_TD.dtype, self.tokens), backward
        self.precise = inputs.to(torch.float64, self.tokens)
        self._exact = exact
        self._known: dict[Prepare, tuple[list[Tensor], list[float]]] = {}

    def _standard(self, exact: Prepare) -> tuple[list[Tensor], list[float]]:
        """What is expected, and what is allowed of each."""
        if exact not in self._known:
            expected = results_of(exact(self.precise), self.backward)
            eager = results_of(exact(self.inputs), self.backward)
            eps = torch.finfo(self.inputs.x_TD.dtype).eps
            allowed = [2 * relative_error(a, e) + eps for a, e in zip(eager, expected, strict=True)]
            self._known[exact] = expected, allowed
        return self._known[exact]

    def judge(self, prepare: Prepare, exact: Prepare | None = None) -> Verdict:
        """The verdict on a variant.

        Args:
            prepare: the variant.
            exact: what it is held against in place of the operation's reference.
        """
        expected, allowed = self._standard(exact or self._exact)
        actual = results_of(prepare(self.inputs), self.backward)
        if len(actual) != len(expected):
            return Verdict(float("inf"), 0.0, f"{len(actual)} results for {len(expected)}")
        verdicts = [
            Verdict(relative_error(a, e), limit, f"gradient {index - 1}" if index else "output")
            for index, (a, e, limit) in enumerate(zip(actual, expected, allowed, strict=True))
        ]
        return next((v for v in verdicts if not v.passed), max(verdicts, key=lambda v: v.error / v.allowed))
