# SPDX-License-Identifier: Apache-2.0
"""Top-K gating with the router's linear layer fused into it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cumo_kernels import reference
from cumo_kernels.backend import backend_for
from cumo_kernels.checks import (
    check_floating,
    check_one_of,
    check_same_device,
    check_segment,
    check_shapes,
    check_top_k,
)
from cumo_kernels.ops.common import check_kernel_dtype, or_empty, or_none, refuse_double_backward, refuse_transforms
from cumo_kernels.ops.topk_gating import PROBS_DTYPES, topk_gating_backward
from cumo_kernels.types import Routing

MAX_EXPERTS = 64  # the logits of a block of tokens are one accumulator of a matrix product


@torch.library.custom_op("cumo_kernels::linear_topk_gating", mutates_args=())
def _linear_topk_gating(
    x_TD: Tensor, gate_ED: Tensor, top_k: int, segment: int, normalize: bool, probs_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from cumo_kernels.kernels.linear_gating import linear_gating_forward

    return linear_gating_forward(x_TD, gate_ED, top_k, segment, normalize, probs_dtype)


@_linear_topk_gating.register_fake
def _(
    x_TD: Tensor, gate_ED: Tensor, top_k: int, segment: int, normalize: bool, probs_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from cumo_kernels.kernels.gating import new_routing

    T, E = x_TD.shape[0], gate_ED.shape[0]
    return *new_routing(x_TD, E, top_k, segment, probs_dtype), x_TD.new_empty((T, E), dtype=torch.float32)


@torch.library.custom_op("cumo_kernels::linear_topk_gating_backward", mutates_args=())
def linear_topk_gating_backward(
    dlogits_TE: Tensor, x_TD: Tensor, gate_ED: Tensor, need_x: bool, need_gate: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of tokens and router weight; empty where they are not needed."""
    from cumo_kernels.kernels.linear_gating import linear_gating_backward

    dx_TD, dgate_ED = linear_gating_backward(dlogits_TE, x_TD, gate_ED, need_x, need_gate)
    return or_empty(dx_TD, x_TD), or_empty(dgate_ED, gate_ED)


@linear_topk_gating_backward.register_fake
def _(dlogits_TE: Tensor, x_TD: Tensor, gate_ED: Tensor, need_x: bool, need_gate: bool) -> tuple[Tensor, Tensor]:
    return x_TD.new_empty(x_TD.shape if need_x else (0,)), gate_ED.new_empty(gate_ED.shape if need_gate else (0,))


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x_TD, gate_ED, _, ctx.segment, ctx.normalize, _ = inputs
    _, expert_TK, *_, share_SE, logits_TE = output
    ctx.mark_non_differentiable(expert_TK, share_SE, logits_TE)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_TD, gate_ED, logits_TE, expert_TK, share_SE)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    dweight_TK, _, dbalance_S, dz_S, dprobs_SE, _, _ = grads
    x_TD, gate_ED, *saved = ctx.saved_tensors
    dlogits_TE = topk_gating_backward(*saved, dweight_TK, dbalance_S, dz_S, dprobs_SE, ctx.segment, ctx.normalize)
    need = ctx.needs_input_grad[:2]
    grads_of_linear = linear_topk_gating_backward(dlogits_TE, x_TD, gate_ED, *need)
    return *(or_none(grad, wanted) for grad, wanted in zip(grads_of_linear, need, strict=True)), None, None, None, None


_linear_topk_gating.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward(linear_topk_gating_backward, "linear_topk_gating")


def linear_topk_gating(
    x_TD: Tensor,
    gate_ED: Tensor,
    top_k: int,
    segment: int | None = None,
    normalize: bool = True,
    probs_dtype: torch.dtype = torch.float32,
) -> Routing:
    """`topk_gating(x gate^T, ...)` with float32 logits, reading the tokens once.

    Products and sums are those of float32 whatever the dtype of `x_TD` and `gate_ED`, without a float32 copy of the
    tokens; autocast does not touch it, as routers want full precision (ST-MoE, arXiv 2202.08906).

    Args:
        x_TD: [T, D] tokens; float16, bfloat16, float32, or float64 on the reference backend.
        gate_ED: [E, D] weight of the router, as in `nn.Linear`; any of these dtypes.
        top_k: as in `topk_gating`.
        segment: as in `topk_gating`.
        normalize: as in `topk_gating`.
        probs_dtype: as in `topk_gating`.

    Returns:
        `Routing`; see `topk_gating`.

    Raises:
        ValueError: an argument does not fit; on the triton backend, more than 64 experts or float64.
        RuntimeError: on the triton backend, a second derivative, forward-mode differentiation or `torch.func.grad`.

    Examples:
        >>> import torch, cumo_kernels as ck
        >>> x_TD, gate_ED = torch.randn(6, 8), torch.randn(4, 8)
        >>> routing = ck.linear_topk_gating(x_TD, gate_ED, top_k=2, segment=3)  # two images of three tokens
        >>> routing.expert_TK.shape, routing.balance_S.shape
        (torch.Size([6, 2]), torch.Size([2]))
        >>> bool((routing.expert_TK == ck.topk_gating(x_TD @ gate_ED.T, top_k=2).expert_TK).all())
        True
    """
    size = check_shapes(x_TD=(x_TD, "T D"), gate_ED=(gate_ED, "E D"))
    check_floating(x_TD=x_TD, gate_ED=gate_ED)
    check_same_device(x_TD=x_TD, gate_ED=gate_ED)
    top_k = check_top_k(top_k, size["E"])
    check_one_of("probs_dtype", probs_dtype, PROBS_DTYPES)
    tokens = check_segment(segment, size["T"])
    if backend_for(x_TD) == "reference":
        return reference.linear_topk_gating(x_TD, gate_ED, top_k, segment, normalize, probs_dtype)
    check_kernel_dtype("x_TD", x_TD)
    check_kernel_dtype("gate_ED", gate_ED)
    if size["E"] > MAX_EXPERTS:
        raise ValueError(
            f"gate_ED: the triton backend expects at most {MAX_EXPERTS} experts, got {size['E']}; "
            "compute the logits with a linear layer and call topk_gating"
        )
    refuse_transforms("linear_topk_gating", x_TD, gate_ED)
    return Routing(*_linear_topk_gating(x_TD, gate_ED, top_k, tokens, normalize, probs_dtype)[:5])
