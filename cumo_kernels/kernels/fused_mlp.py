# SPDX-License-Identifier: Apache-2.0
"""The sequence of launches that makes up the expert layer, forward and backward."""

from __future__ import annotations

from torch import Tensor

from cumo_kernels import tiling
from cumo_kernels.kernels.grad_rows import grad_rows
from cumo_kernels.kernels.grouped_dact import grouped_dact
from cumo_kernels.kernels.grouped_gemm import grouped_gemm_forward
from cumo_kernels.kernels.grouped_wgrad import grouped_wgrad
from cumo_kernels.kernels.launch import target_of
from cumo_kernels.kernels.permute import combine_forward, permute_forward


def moe_mlp_forward(
    x_TD: Tensor,
    weight_TK: Tensor,
    w1_EFD: Tensor,
    w2_EOF: Tensor,
    b1_EF: Tensor | None,
    b2_EO: Tensor | None,
    residual_TO: Tensor | None,
    token_N: Tensor,
    slot_TK: Tensor,
    offset_E1: Tensor,
    activation: str,
    gated: bool,
    save_z: bool,
) -> tuple[Tensor, Tensor | None]:
    """3 launches, or 4 with a sorted copy of the tokens; returns y_TO and z_NF (None unless `save_z`)."""
    N = token_N.shape[0]
    sorted_copy = tiling.use_sorted_copy(target_of(x_TD), N)
    a_NF, z_NF = grouped_gemm_forward(
        permute_forward(x_TD, token_N) if sorted_copy else x_TD, w1_EFD, offset_E1, N,
        bias_EN=b1_EF, token_N=None if sorted_copy else token_N, activation=activation, gated=gated, save_z=save_z,
    )  # fmt: skip
    assert a_NF is not None
    y_NO, _ = grouped_gemm_forward(a_NF, w2_EOF, offset_E1, N, bias_EN=b2_EO)
    assert y_NO is not None
    return combine_forward(y_NO, slot_TK, weight_TK, residual_TO), z_NF


def moe_mlp_backward(
    dy_TO: Tensor,
    x_TD: Tensor,
    weight_TK: Tensor,
    w1_EFD: Tensor,
    w2_EOF: Tensor,
    b1_EF: Tensor | None,
    b2_EO: Tensor | None,
    z_NF: Tensor | None,
    token_N: Tensor,
    route_N: Tensor,
    slot_TK: Tensor,
    offset_E1: Tensor,
    activation: str,
    gated: bool,
    need: list[bool],
) -> tuple[Tensor | None, ...]:
    """At most 6 launches, and one or two more to recompute z if it was not saved; returns the gradients of x, weight,
    W1, W2, b1, b2, each None unless `need` asks for it.

    With s the gate weight of a row and da = dO W2: dz = s da act'(z), dW2 = dO^T (s a), dx = dz W1, dW1 = dz^T x,
    dweight = <da, a> + <dO, b2>, db1 = sum dz, db2 = sum s dO.
    """
    need_x, need_weight, need_w1, need_w2, need_b1, need_b2 = need
    N = token_N.shape[0]
    dy_TO = dy_TO if dy_TO.stride(1) == 1 else dy_TO.contiguous()
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    weight_TK = weight_TK.contiguous()
    sorted_copy = tiling.use_sorted_copy(target_of(x_TD), N)
    rows = grad_rows(
        dy_TO, x_TD, token_N, route_N, offset_E1, weight_TK,
        b2_EO if need_b2 or need_weight else None,
        copy_dout=sorted_copy, copy_x=sorted_copy and (need_w1 or z_NF is None),
    )  # fmt: skip
    dout, x = rows.dout_NO if sorted_copy else dy_TO, rows.x_ND if sorted_copy else x_TD
    token = None if sorted_copy else token_N
    assert dout is not None
    if z_NF is None:
        assert x is not None
        _, z_NF = grouped_gemm_forward(x, w1_EFD, offset_E1, N, bias_EN=b1_EF, token_N=token, gated=gated, only_z=True)
        assert z_NF is not None
    dz_NF, a_NF, score, partial, partial_rows = grouped_dact(
        dout, w2_EOF.transpose(1, 2), offset_E1, weight_TK, route_N, z_NF,
        token_N=token, bias_score_N=rows.score_N, activation=activation, gated=gated,
        want_a=need_w2, want_score=need_weight, want_bias=need_b1,
    )  # fmt: skip
    dw1 = dw2 = db1 = db2 = dx_ND = None
    if need_w2 or need_b2:
        dw2, db2 = grouped_wgrad(
            dout, a_NF, offset_E1, token_N=token, gather_g=not sorted_copy,
            partial=rows.partial if need_b2 else None, partial_rows=rows.partial_rows,
        )  # fmt: skip
    if need_x:
        dx_ND, _ = grouped_gemm_forward(dz_NF, w1_EFD.transpose(1, 2), offset_E1, N)
    if need_w1 or need_b1:
        dw1, db1 = grouped_wgrad(
            dz_NF, x if need_w1 else None, offset_E1, token_N=token, gather_x=not sorted_copy,
            partial=partial, partial_rows=partial_rows,
        )  # fmt: skip
    dx_TD, dweight_TK = _sum_into_tokens(dx_ND, score, slot_TK, weight_TK)
    return dx_TD, dweight_TK, dw1, dw2, db1, db2


def _sum_into_tokens(
    dx_ND: Tensor | None, score: Tensor | None, slot_TK: Tensor, weight_TK: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """One launch: dx[t] = sum_k dx_rows[slot[t, k]], and the gradient of the gate weights from `score`."""
    if dx_ND is None and score is None:
        return None, None
    dweight_TK = None if score is None else weight_TK.new_empty(weight_TK.shape)
    # without dx, rows of no columns: only the scores are summed
    rows_ND = score.new_empty(score.shape[1], 0) if dx_ND is None and score is not None else dx_ND
    assert rows_ND is not None
    dx_TD = combine_forward(rows_ND, slot_TK, score_PN=score, dweight_TK=dweight_TK)
    return (None if dx_ND is None else dx_TD), dweight_TK
