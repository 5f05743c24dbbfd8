# SPDX-License-Identifier: Apache-2.0
"""The whole expert layer, fused: permute, up projection, activation, down projection, combine.

Forward: [copy tokens ->] GEMM + bias + activation -> GEMM + bias -> weighted sum. Saved for the backward: x, z (the
pre-activation), the gate weights and the plan; neither the activation nor the experts' outputs.
Backward: rows pass (bias sums) -> GEMM + activation gradient -> dW2 -> dx rows -> dW1 -> sum into tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cumo_kernels import reference
from cumo_kernels.activations import ACTIVATIONS
from cumo_kernels.backend import backend_for
from cumo_kernels.checks import (
    check_floating,
    check_integer,
    check_one_of,
    check_same_device,
    check_shapes,
)
from cumo_kernels.ops.common import (
    autocast,
    check_kernel_dtype,
    check_residual,
    or_empty,
    or_none,
    refuse_double_backward,
    refuse_transforms,
    wants_gradient,
)
from cumo_kernels.ops.plan_dispatch import plan_dispatch

NUM_INPUTS = 14  # of the operator below


@torch.library.custom_op("cumo_kernels::moe_mlp", mutates_args=())
def _moe_mlp(
    x_TD: Tensor,
    weight_TK: Tensor,
    w1_EFD: Tensor,
    w2_EOF: Tensor,
    b1_EF: Tensor | None,
    b2_EO: Tensor | None,
    residual_TO: Tensor | None,
    token_N: Tensor,
    route_N: Tensor,  # for the backward
    slot_TK: Tensor,
    offset_E1: Tensor,
    activation: str,
    gated: bool,
    save_z: bool,
) -> tuple[Tensor, Tensor]:
    from cumo_kernels.kernels.fused_mlp import moe_mlp_forward

    y_TO, z_NF = moe_mlp_forward(
        x_TD, weight_TK, w1_EFD, w2_EOF, b1_EF, b2_EO, residual_TO, token_N, slot_TK, offset_E1,
        activation, gated, save_z,
    )  # fmt: skip
    return y_TO, or_empty(z_NF, x_TD)


@_moe_mlp.register_fake
def _(
    x_TD: Tensor,
    weight_TK: Tensor,
    w1_EFD: Tensor,
    w2_EOF: Tensor,
    b1_EF: Tensor | None,
    b2_EO: Tensor | None,
    residual_TO: Tensor | None,
    token_N: Tensor,
    route_N: Tensor,
    slot_TK: Tensor,
    offset_E1: Tensor,
    activation: str,
    gated: bool,
    save_z: bool,
) -> tuple[Tensor, Tensor]:
    y_TO = x_TD.new_empty(x_TD.shape[0], w2_EOF.shape[1])
    return y_TO, x_TD.new_empty((token_N.shape[0], w1_EFD.shape[1]) if save_z else (0,))


@torch.library.custom_op("cumo_kernels::moe_mlp_backward", mutates_args=())
def moe_mlp_backward(
    dy_TO: Tensor,
    x_TD: Tensor,
    weight_TK: Tensor,
    w1_EFD: Tensor,
    w2_EOF: Tensor,
    b1_EF: Tensor | None,
    b2_EO: Tensor | None,
    z_NF: Tensor,
    token_N: Tensor,
    route_N: Tensor,
    slot_TK: Tensor,
    offset_E1: Tensor,
    activation: str,
    gated: bool,
    saved_z: bool,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, W1, W2, b1, b2; empty where `need` says that they are not needed."""
    from cumo_kernels.kernels.fused_mlp import moe_mlp_backward

    grads = moe_mlp_backward(
        dy_TO, x_TD, weight_TK, w1_EFD, w2_EOF, b1_EF, b2_EO, or_none(z_NF, saved_z),
        token_N, route_N, slot_TK, offset_E1, activation, gated, need,
    )  # fmt: skip
    dx, dweight, dw1, dw2, db1, db2 = (or_empty(grad, x_TD) for grad in grads)
    return dx, dweight, dw1, dw2, db1, db2


@moe_mlp_backward.register_fake
def _(
    dy_TO: Tensor,
    x_TD: Tensor,
    weight_TK: Tensor,
    w1_EFD: Tensor,
    w2_EOF: Tensor,
    b1_EF: Tensor | None,
    b2_EO: Tensor | None,
    z_NF: Tensor,
    token_N: Tensor,
    route_N: Tensor,
    slot_TK: Tensor,
    offset_E1: Tensor,
    activation: str,
    gated: bool,
    saved_z: bool,
    need: list[bool],
) -> tuple[Tensor, ...]:
    inputs = (x_TD, weight_TK, w1_EFD, w2_EOF, b1_EF, b2_EO)
    grads = (t.new_empty(t.shape) if n and t is not None else None for t, n in zip(inputs, need, strict=True))
    return tuple(or_empty(grad, x_TD) for grad in grads)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x_TD, weight_TK, w1_EFD, w2_EOF, b1_EF, b2_EO, _, *plan, ctx.activation, ctx.gated, ctx.saved_z = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_TD, weight_TK, w1_EFD, w2_EOF, b1_EF, b2_EO, output[1], *plan)


def _backward(ctx: Any, dy_TO: Tensor | None, _dz: None) -> tuple[Tensor | None, ...]:
    if dy_TO is None:
        return (None,) * NUM_INPUTS
    need = list(ctx.needs_input_grad[:6])
    wanted: list[Tensor | None] = [None] * len(need)
    if any(need):
        grads = moe_mlp_backward(dy_TO, *ctx.saved_tensors, ctx.activation, ctx.gated, ctx.saved_z, need)
        wanted = [or_none(grad, n) for grad, n in zip(grads, need, strict=True)]
    return *wanted, dy_TO if ctx.needs_input_grad[6] else None, *(None,) * (NUM_INPUTS - 7)


_moe_mlp.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward(moe_mlp_backward, "moe_mlp")


def moe_mlp(
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    w1_EFD: Tensor,
    w2_EOF: Tensor,
    b1_EF: Tensor | None = None,
    b2_EO: Tensor | None = None,
    activation: str = "gelu",
    gated: bool = False,
    recompute: bool = False,
    residual_TO: Tensor | None = None,
) -> Tensor:
    """`y[t] = residual[t] + sum_k weight[t, k] (W2[e] act(W1[e] x[t] + b1[e]) + b2[e])` with `e = expert[t, k]`.

    Accumulates in float32 (float64 for float64); the order of every sum is fixed, so results are bitwise
    reproducible. On the triton backend only x and the pre-activation z are saved for the backward (formulation of
    SonicMoE, arXiv 2512.14080), which cannot be differentiated again. Autocast casts x, w1, w2, b1 and b2, as for a
    linear layer, but not weight_TK.

    Args:
        x_TD: [T, D] tokens; float16, bfloat16, float32, or float64 on the reference backend.
        weight_TK: [T, K] gate weights, any of these dtypes, K >= 1.
        expert_TK: [T, K] expert ids, int32 or int64. A choice whose id is outside 0..E-1 adds nothing to the sum.
        w1_EFD: [E, F, D] up projections, E >= 1, each as in `nn.Linear`; [E, 2F, D], gate rows first, if `gated`.
        w2_EOF: [E, O, F] down projections.
        b1_EF: [E, F] ([E, 2F] if `gated`), or None.
        b2_EO: [E, O], or None.
        activation: a name in `cumo_kernels.ACTIVATIONS`.
        gated: act(gate) * up in place of act(up), as in SwiGLU (arXiv 2002.05202).
        recompute: save x only, and run the up projection once more in the backward.
        residual_TO: [T, O] added in float32 before the one rounding of the output, or None. Not cast: it must already
            have the output's dtype, so that a wider residual is never rounded silently.

    Returns:
        [T, O] in the dtype of `x_TD` (of autocast, if on).

    Raises:
        ValueError: an argument does not fit; on the triton backend, float64.
        RuntimeError: on the triton backend, a second derivative, forward-mode differentiation or `torch.func.grad`.

    Examples:
        >>> import torch, cumo_kernels as ck
        >>> x_TD = torch.randn(5, 8, requires_grad=True)
        >>> routing = ck.topk_gating(torch.randn(5, 4), top_k=2)
        >>> w1_FD, w2_OF = torch.randn(16, 8), torch.randn(6, 16)
        >>> w1_EFD, w2_EOF = w1_FD.repeat(4, 1, 1), w2_OF.repeat(4, 1, 1)  # four experts that agree
        >>> y_TO = ck.moe_mlp(x_TD, routing.weight_TK, routing.expert_TK, w1_EFD, w2_EOF)
        >>> dense_TO = torch.nn.functional.gelu(x_TD @ w1_FD.T) @ w2_OF.T
        >>> y_TO.shape, torch.allclose(y_TO, dense_TO, atol=1e-4)  # weights of a token sum to one
        (torch.Size([5, 6]), True)
        >>> y_TO.sum().backward()
        >>> x_TD.grad.shape
        torch.Size([5, 8])
    """
    _check(x_TD, weight_TK, expert_TK, w1_EFD, w2_EOF, b1_EF, b2_EO, gated, residual_TO)
    check_one_of("activation", activation, ACTIVATIONS)
    x_TD, w1_EFD, w2_EOF, b1_EF, b2_EO = autocast(  # type: ignore[assignment]
        x_TD=x_TD, w1_EFD=w1_EFD, w2_EOF=w2_EOF, b1_EF=b1_EF, b2_EO=b2_EO
    )
    check_residual(residual_TO, x_TD, "x_TD")
    if backend_for(x_TD) == "reference":
        return reference.moe_mlp(
            x_TD, weight_TK, expert_TK, w1_EFD, w2_EOF, b1_EF, b2_EO, activation, gated, recompute, residual_TO
        )
    check_kernel_dtype("x_TD", x_TD)
    check_kernel_dtype("weight_TK", weight_TK)
    inputs = (x_TD, weight_TK, w1_EFD, w2_EOF, b1_EF, b2_EO)
    refuse_transforms("moe_mlp", *inputs, residual_TO)
    plan = plan_dispatch(expert_TK, w1_EFD.shape[0])
    save_z = not recompute and wants_gradient(*inputs)
    return _moe_mlp(*inputs, residual_TO, *plan, activation, gated, save_z)[0]


def _check(
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    w1_EFD: Tensor,
    w2_EOF: Tensor,
    b1_EF: Tensor | None,
    b2_EO: Tensor | None,
    gated: bool,
    residual_TO: Tensor | None,
) -> None:
    size = check_shapes(
        x_TD=(x_TD, "T D"),
        weight_TK=(weight_TK, "T K"),
        expert_TK=(expert_TK, "T K"),
        w1_EFD=(w1_EFD, "E F1 D"),
        w2_EOF=(w2_EOF, "E O F"),
        b1_EF=(b1_EF, "E F1"),
        b2_EO=(b2_EO, "E O"),
        residual_TO=(residual_TO, "T O"),
    )
    expected = size["F"] * (2 if gated else 1)
    if size["F1"] != expected:
        raise ValueError(
            f"w1_EFD: expected {expected} rows per expert ({'2 * ' if gated else ''}F, with F={size['F']} as in w2_EOF "
            f"and gated={gated}), got {list(w1_EFD.shape)}"
        )
    for letter, name, tensor in (("K", "expert_TK", expert_TK), ("E", "w1_EFD", w1_EFD)):
        if size[letter] < 1:
            raise ValueError(f"{name}: expected {letter} >= 1, got {list(tensor.shape)}")
    check_floating(weight_TK=weight_TK)
    check_integer(expert_TK=expert_TK)
    check_same_device(
        x_TD=x_TD, weight_TK=weight_TK, expert_TK=expert_TK, w1_EFD=w1_EFD, w2_EOF=w2_EOF, b1_EF=b1_EF, b2_EO=b2_EO,
        residual_TO=residual_TO,
    )  # fmt: skip
