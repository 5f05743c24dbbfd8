# SPDX-License-Identifier: Apache-2.0
"""CPU microbenchmarks of the expert layer: the reference backend beside a plain loop over experts.

`make bench` runs them; `--benchmark-autosave` and `--benchmark-compare` (pytest-benchmark) compare commits. A variant
that disagrees with the other is not timed.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cumo_kernels as ck

SHAPES = [
    pytest.param(1, 2, 8, 64, 128, 64, id="one-token"),
    pytest.param(64, 2, 8, 128, 256, 128, id="few-tokens"),
    pytest.param(4096, 2, 8, 64, 128, 64, id="many-narrow-tokens"),
    pytest.param(577, 2, 4, 1024, 4096, 1024, id="CLIP-MoE-one-image"),
    pytest.param(2048, 8, 64, 128, 128, 128, id="fine-grained-experts"),
]


def loop_over_experts(
    x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, w1_EFD: Tensor, w2_EOF: Tensor, b1_EF: Tensor, b2_EO: Tensor
) -> Tensor:
    """What most implementations start from: find each expert's tokens, run them, add them up."""
    y_TO = x_TD.new_zeros(x_TD.shape[0], w2_EOF.shape[1])
    for e in range(w1_EFD.shape[0]):
        t, k = torch.where(expert_TK == e)
        if t.numel():
            a = F.gelu(F.linear(x_TD[t], w1_EFD[e], b1_EF[e]))
            y_TO.index_add_(0, t, weight_TK[t, k, None] * F.linear(a, w2_EOF[e], b2_EO[e]))
    return y_TO


def reference(*inputs: Tensor) -> Tensor:
    """The reference backend."""
    with ck.use_backend("reference"):
        return ck.moe_mlp(*inputs)


VARIANTS = {"loop": loop_over_experts, "reference": reference}


def forward(layer: Callable[..., Tensor], inputs: list[Tensor], _dy: Tensor) -> list[Tensor]:
    """Inference."""
    with torch.no_grad():
        return [layer(*inputs)]


def forward_backward(layer: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    """One training step: output and all gradients."""
    y = layer(*inputs)
    return [y.detach(), *torch.autograd.grad(y, [t for t in inputs if t.requires_grad], dy)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("run", [forward, forward_backward])
@pytest.mark.parametrize(("T", "K", "E", "D", "F", "O"), SHAPES)
def test_expert_layer(benchmark, T, K, E, D, F, O, run, variant):  # noqa: F811
    torch.manual_seed(0)
    benchmark.group = f"T={T} K={K} E={E} D={D} F={F} O={O}: {run.__name__}"
    expert_TK = torch.rand(T, E).argsort(dim=1)[:, :K].int()
    shapes = (E, F, D), (E, O, F), (E, F), (E, O)
    weights = [(torch.randn(shape) / shape[-1] ** 0.5).requires_grad_() for shape in shapes]
    inputs = [torch.randn(T, D, requires_grad=True), torch.rand(T, K, requires_grad=True), expert_TK, *weights]
    dy = torch.randn(T, O)
    for actual, expected in zip(run(VARIANTS[variant], inputs, dy), run(loop_over_experts, inputs, dy), strict=True):
        assert (actual - expected).norm() <= 1e-5 * expected.norm()
    benchmark(run, VARIANTS[variant], inputs, dy)
