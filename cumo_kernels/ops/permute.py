# SPDX-License-Identifier: Apache-2.0
"""Tokens into expert-sorted rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cumo_kernels import reference
from cumo_kernels.backend import backend_for
from cumo_kernels.checks import check_floating
from cumo_kernels.ops.common import check_kernel_dtype, check_plan, refuse_double_backward, refuse_transforms
from cumo_kernels.types import DispatchPlan


@torch.library.custom_op("cumo_kernels::permute", mutates_args=())
def _permute(x_TD: Tensor, token_N: Tensor, slot_TK: Tensor) -> Tensor:  # slot_TK is for the backward
    from cumo_kernels.kernels.permute import permute_forward

    return permute_forward(x_TD, token_N)


@_permute.register_fake
def _(x_TD: Tensor, token_N: Tensor, slot_TK: Tensor) -> Tensor:
    return x_TD.new_empty(token_N.shape[0], x_TD.shape[1])


@torch.library.custom_op("cumo_kernels::permute_backward", mutates_args=())
def permute_backward(dx_ND: Tensor, slot_TK: Tensor) -> Tensor:
    """dx[t] = sum_k dx_rows[slot[t, k]]."""
    from cumo_kernels.kernels.permute import combine_forward

    return combine_forward(dx_ND, slot_TK)


@permute_backward.register_fake
def _(dx_ND: Tensor, slot_TK: Tensor) -> Tensor:
    return dx_ND.new_empty(slot_TK.shape[0], dx_ND.shape[1])


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[2])


def _backward(ctx: Any, dx_ND: Tensor) -> tuple[Tensor, None, None]:
    return permute_backward(dx_ND, *ctx.saved_tensors), None, None


_permute.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward(permute_backward, "permute")


def permute(x_TD: Tensor, plan: DispatchPlan) -> Tensor:
    """`x_ND[n] = x_TD[plan.token_N[n]]`: copy every token to the rows of its experts; rows of no expert are zero.

    Args:
        x_TD: [T, D] tokens.
        plan: layout of the same T tokens, on the same device.

    Returns:
        [N, D] rows sorted by expert, N = T * K, in the dtype of `x_TD`.

    Raises:
        ValueError: an argument does not fit; on the triton backend, float64.
        RuntimeError: on the triton backend, a second derivative, forward-mode differentiation or `torch.func.grad`.

    Examples:
        >>> import torch, cumo_kernels as ck
        >>> plan = ck.plan_dispatch(torch.tensor([[1], [0], [1]]), num_experts=2)
        >>> ck.permute(torch.tensor([[10.0], [20.0], [30.0]]), plan).flatten().tolist()  # a row of expert 0, two of 1
        [20.0, 10.0, 30.0]
    """
    plan = check_plan(plan, x_TD=(x_TD, "T D"))
    check_floating(x_TD=x_TD)
    if backend_for(x_TD) == "reference":
        return reference.permute(x_TD, plan)
    check_kernel_dtype("x_TD", x_TD)
    refuse_transforms("permute", x_TD)
    return _permute(x_TD, plan.token_N, plan.slot_TK)
