# SPDX-License-Identifier: Apache-2.0
"""Grouped GEMM over expert-sorted rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cumo_kernels import reference
from cumo_kernels.activations import ACTIVATIONS
from cumo_kernels.backend import backend_for
from cumo_kernels.checks import check_one_of, check_same_device
from cumo_kernels.ops.common import (
    autocast,
    check_kernel_dtype,
    check_plan,
    or_empty,
    or_none,
    refuse_double_backward,
    refuse_transforms,
    wants_gradient,
)
from cumo_kernels.types import DispatchPlan


@torch.library.custom_op("cumo_kernels::grouped_gemm", mutates_args=())
def _grouped_gemm(
    x_ND: Tensor, w_EFD: Tensor, bias_EF: Tensor | None, offset_E1: Tensor, activation: str | None, save_z: bool
) -> tuple[Tensor, Tensor]:
    from cumo_kernels.kernels.grouped_gemm import grouped_gemm_forward

    h_NF, z_NF = grouped_gemm_forward(
        x_ND, w_EFD, offset_E1, x_ND.shape[0], bias_EN=bias_EF, activation=activation, save_z=save_z, zero_tail=True
    )
    assert h_NF is not None
    return h_NF, or_empty(z_NF, x_ND)


@_grouped_gemm.register_fake
def _(
    x_ND: Tensor,
    w_EFD: Tensor,
    bias_EF: Tensor | None,
    offset_E1: Tensor,
    activation: str | None,
    save_z: bool,
) -> tuple[Tensor, Tensor]:
    h_NF = x_ND.new_empty(x_ND.shape[0], w_EFD.shape[1])
    return h_NF, or_empty(torch.empty_like(h_NF) if save_z else None, x_ND)


@torch.library.custom_op("cumo_kernels::grouped_gemm_backward", mutates_args=())
def grouped_gemm_backward(
    dh_NF: Tensor,
    x_ND: Tensor,
    w_EFD: Tensor,
    z_NF: Tensor,
    offset_E1: Tensor,
    activation: str | None,
    need_x: bool,
    need_w: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows, weights and bias; empty where they are not needed."""
    from cumo_kernels.kernels.grad_rows import activation_grad
    from cumo_kernels.kernels.grouped_gemm import grouped_gemm_forward
    from cumo_kernels.kernels.grouped_wgrad import grouped_wgrad

    z = or_none(z_NF, activation is not None)
    dz_NF, partial, partial_rows = activation_grad(dh_NF, z, offset_E1, activation, need_bias)
    dx_ND = dw_EFD = dbias_EF = None
    if need_x:
        dx_ND, _ = grouped_gemm_forward(dz_NF, w_EFD.transpose(1, 2), offset_E1, x_ND.shape[0], zero_tail=True)
    if need_w or need_bias:
        dw_EFD, dbias_EF = grouped_wgrad(dz_NF, x_ND, offset_E1, partial=partial, partial_rows=partial_rows)
    return or_empty(dx_ND, x_ND), or_empty(dw_EFD, x_ND), or_empty(dbias_EF, x_ND)


@grouped_gemm_backward.register_fake
def _(
    dh_NF: Tensor,
    x_ND: Tensor,
    w_EFD: Tensor,
    z_NF: Tensor,
    offset_E1: Tensor,
    activation: str | None,
    need_x: bool,
    need_w: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x_ND.new_empty(x_ND.shape if need_x else (0,)),
        w_EFD.new_empty(w_EFD.shape if need_w or need_bias else (0,)),
        w_EFD.new_empty(w_EFD.shape[:2] if need_bias else (0,)),
    )


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x_ND, w_EFD, _, offset_E1, ctx.activation, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_ND, w_EFD, output[1], offset_E1)


def _backward(ctx: Any, dh_NF: Tensor | None, _dz: None) -> tuple[Tensor | None, ...]:
    if dh_NF is None:
        return (None,) * 6
    need = ctx.needs_input_grad[:3]
    grads = grouped_gemm_backward(dh_NF, *ctx.saved_tensors, ctx.activation, *need)
    return *(or_none(grad, wanted) for grad, wanted in zip(grads, need, strict=True)), None, None, None


_grouped_gemm.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward(grouped_gemm_backward, "grouped_gemm")


def grouped_gemm(
    x_ND: Tensor, w_EFD: Tensor, plan: DispatchPlan, bias_EF: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """`h[n] = act(W[e] x[n] + b[e])` for the rows n of expert e; rows of no expert are zero.

    Accumulates in float32 (float64 for float64). Autocast casts x, w and bias, as for a linear layer.

    Args:
        x_ND: [N, D] rows sorted by expert.
        w_EFD: [E, F, D] weights, each expert's as in `nn.Linear`; a transposed view is not copied.
        plan: the layout of the rows.
        bias_EF: [E, F], or None.
        activation: a name in `cumo_kernels.ACTIVATIONS`, or None.

    Returns:
        [N, F] in the dtype of `x_ND` (of autocast, if on).

    Raises:
        ValueError: an argument does not fit; on the triton backend, float64.
        RuntimeError: on the triton backend, a second derivative, forward-mode differentiation or `torch.func.grad`.

    Examples:
        >>> import torch, cumo_kernels as ck
        >>> plan = ck.plan_dispatch(torch.tensor([[0], [1], [1]]), num_experts=2)
        >>> w_EFD = torch.stack([torch.ones(2, 4), -torch.ones(2, 4)])
        >>> ck.grouped_gemm(torch.ones(3, 4), w_EFD, plan, activation="relu").tolist()  # each row by its expert
        [[4.0, 4.0], [0.0, 0.0], [0.0, 0.0]]
    """
    plan = check_plan(plan, x_ND=(x_ND, "N D"), w_EFD=(w_EFD, "E F D"), bias_EF=(bias_EF, "E F"))
    if w_EFD.shape[0] != plan.num_experts:
        raise ValueError(f"w_EFD: expected E={plan.num_experts} experts as in plan, got {list(w_EFD.shape)}")
    if activation is not None:
        check_one_of("activation", activation, ACTIVATIONS)
    check_same_device(x_ND=x_ND, w_EFD=w_EFD, bias_EF=bias_EF)
    x_ND, w_EFD, bias_EF = autocast(x_ND=x_ND, w_EFD=w_EFD, bias_EF=bias_EF)  # type: ignore[assignment]
    if backend_for(x_ND) == "reference":
        return reference.grouped_gemm(x_ND, w_EFD, plan, bias_EF, activation)
    check_kernel_dtype("x_ND", x_ND)
    refuse_transforms("grouped_gemm", x_ND, w_EFD, bias_EF)
    save_z = activation is not None and wants_gradient(x_ND, w_EFD, bias_EF)
    return _grouped_gemm(x_ND, w_EFD, bias_EF, plan.offset_E1, activation, save_z)[0]
