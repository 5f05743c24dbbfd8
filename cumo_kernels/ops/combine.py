# SPDX-License-Identifier: Apache-2.0
"""Expert outputs back into tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cumo_kernels import reference
from cumo_kernels.backend import backend_for
from cumo_kernels.checks import check_floating, check_same_device, check_same_dtype
from cumo_kernels.ops.common import check_kernel_dtype, check_plan, refuse_double_backward, refuse_transforms
from cumo_kernels.types import DispatchPlan


@torch.library.custom_op("cumo_kernels::combine", mutates_args=())
def _combine(
    y_NO: Tensor,
    weight_TK: Tensor,
    residual_TO: Tensor | None,
    token_N: Tensor,  # for the backward
    route_N: Tensor,
    slot_TK: Tensor,
) -> Tensor:
    from cumo_kernels.kernels.permute import combine_forward

    return combine_forward(y_NO, slot_TK, weight_TK, residual_TO)


@_combine.register_fake
def _(
    y_NO: Tensor,
    weight_TK: Tensor,
    residual_TO: Tensor | None,
    token_N: Tensor,
    route_N: Tensor,
    slot_TK: Tensor,
) -> Tensor:
    return y_NO.new_empty(slot_TK.shape[0], y_NO.shape[1])


@torch.library.custom_op("cumo_kernels::combine_backward", mutates_args=())
def combine_backward(
    dy_TO: Tensor, y_NO: Tensor, weight_TK: Tensor, token_N: Tensor, route_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the rows and of the weights."""
    from cumo_kernels.kernels.permute import combine_backward

    return combine_backward(dy_TO, y_NO, weight_TK, token_N, route_N)


@combine_backward.register_fake
def _(
    dy_TO: Tensor,
    y_NO: Tensor,
    weight_TK: Tensor,
    token_N: Tensor,
    route_N: Tensor,
) -> tuple[Tensor, Tensor]:
    return y_NO.new_empty(y_NO.shape), weight_TK.new_empty(weight_TK.shape)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    y_NO, weight_TK, _, token_N, route_N, _ = inputs
    ctx.save_for_backward(y_NO, weight_TK, token_N, route_N)


def _backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None, None]:
    dy_NO, dweight_TK = combine_backward(dy_TO, *ctx.saved_tensors)
    return dy_NO, dweight_TK, dy_TO if ctx.needs_input_grad[2] else None, None, None, None


_combine.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward(combine_backward, "combine")


def combine(y_NO: Tensor, weight_TK: Tensor, plan: DispatchPlan, residual_TO: Tensor | None = None) -> Tensor:
    """`out[t] = residual[t] + sum_k weight[t, k] y[plan.slot_TK[t, k]]`, summed in float32 in the order of k.

    Ignored choices (slot -1) add nothing. Each token gathers its rows, without atomics, so results are bitwise
    reproducible. Autocast casts nothing here.

    Args:
        y_NO: [N, O] rows sorted by expert.
        weight_TK: [T, K] gate weights, any floating-point dtype.
        plan: the layout of the rows.
        residual_TO: [T, O] in the dtype of `y_NO`, added before the one rounding to it; or None.

    Returns:
        [T, O] in the dtype of `y_NO`.

    Raises:
        ValueError: an argument does not fit; on the triton backend, float64.
        RuntimeError: on the triton backend, a second derivative, forward-mode differentiation or `torch.func.grad`.

    Examples:
        >>> import torch, cumo_kernels as ck
        >>> plan = ck.plan_dispatch(torch.tensor([[1, 0], [0, 1]]), num_experts=2)
        >>> y_NO = torch.tensor([[1.0], [2.0], [10.0], [20.0]])  # tokens 0 and 1 of expert 0, then of expert 1
        >>> weight_TK = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
        >>> ck.combine(y_NO, weight_TK, plan).tolist()  # 0.75 * 10 + 0.25 * 1, and 0.5 * 2 + 0.5 * 20
        [[7.75], [11.0]]
    """
    plan = check_plan(plan, y_NO=(y_NO, "N O"), weight_TK=(weight_TK, "T K"), residual_TO=(residual_TO, "T O"))
    check_floating(weight_TK=weight_TK)
    check_same_dtype(y_NO=y_NO, residual_TO=residual_TO)
    check_same_device(y_NO=y_NO, weight_TK=weight_TK, residual_TO=residual_TO)
    if backend_for(y_NO) == "reference":
        return reference.combine(y_NO, weight_TK, plan, residual_TO)
    check_kernel_dtype("y_NO", y_NO)
    check_kernel_dtype("weight_TK", weight_TK)
    refuse_transforms("combine", y_NO, weight_TK, residual_TO)
    return _combine(y_NO, weight_TK, residual_TO, plan.token_N, plan.route_N, plan.slot_TK)
