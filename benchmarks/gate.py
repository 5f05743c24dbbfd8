# SPDX-License-Identifier: Apache-2.0
"""The gate before every timing: a variant with wrong results is not timed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.variants import Call, Prepare
from benchmarks.workloads import LayerInputs

TOKENS_ON_CUDA, TOKENS_ON_CPU = 16384, 2048  # of which float64 copies fit in memory, and time on a CPU


@dataclass(frozen=True)
class Verdict:
    """The error of a variant in the result where it is largest relative to what is allowed."""

    error: float
    """Norm of the difference over that of the expected result."""
    allowed: float
    """Twice the error of eager PyTorch in the same dtype, plus the epsilon of the dtype."""
    worst: str
    """The result in question: the output, or a gradient by its number."""

    @property
    def passed(self) -> bool:
        """Whether the variant may be timed. With NaN it may not."""
        return self.error <= self.allowed


def results_of(call: Call, backward: bool) -> list[Tensor]:
    """The output and, with `backward`, the gradients from a cotangent that depends on nothing but the shape."""
    with torch.set_grad_enabled(backward):
        y = call.run()
    if not backward:
        return [y]
    return [y.detach(), *torch.autograd.grad(y, call.leaves, cotangent_of(call, y))]


def cotangent_of(call: Call, y: Tensor) -> Tensor:
    """The cotangent of the call, or else random numbers."""
    if call.cotangent is not None:
        return call.cotangent
    generator = torch.Generator().manual_seed(2)
    return torch.randn(y.shape, generator=generator).to(y.device, y.dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of the expected result; infinite if the shapes differ."""
    if actual.shape != expected.shape:
        return float("inf")
    expected = expected.double()
    scale = expected.norm().item()
    difference = (actual.double() - expected).norm().item()
    return difference / scale if scale else difference


class Gate:
    """Compares variants of an operation and workload with the float64 reference, on the first tokens if there are many.

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
        """The expected results, and the error allowed in each."""
        if exact not in self._known:
            expected = results_of(exact(self.precise), self.backward)
            eager = results_of(exact(self.inputs), self.backward)
            eps = torch.finfo(self.inputs.x_TD.dtype).eps
            allowed = [2 * relative_error(a, e) + eps for a, e in zip(eager, expected, strict=True)]
            self._known[exact] = expected, allowed
        return self._known[exact]

    def judge(self, prepare: Prepare, exact: Prepare | None = None) -> Verdict:
        """Compare a variant with what is expected of it.

        Args:
            prepare: the variant.
            exact: compared with this in place of the reference of the operation.
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
