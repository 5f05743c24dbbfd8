# SPDX-License-Identifier: Apache-2.0
"""Passes over rows that the backward needs beside its GEMMs: copies, bias gradients, scores, activation gradients.

Both kernels walk row tiles that never cross from one expert to the next, and write per tile the column sums that
`grouped_wgrad` adds up to a bias gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cumo_kernels import tiling
from cumo_kernels.kernels.epilogues import activation_and_derivative
from cumo_kernels.kernels.launch import launch
from cumo_kernels.kernels.numerics import narrow
from cumo_kernels.kernels.schedule import expert_rows, find_expert


@triton.jit
def _expert_tile(offset_ptr, E: tl.constexpr, E_PAD: tl.constexpr, BLOCK_N: tl.constexpr):
    """Expert, rows and end of the rows for this program's row tile; no rows past the last tile."""
    row_tile = tl.program_id(0)
    tiles, last = expert_rows(offset_ptr, E, E_PAD, BLOCK_N)
    expert, first_tile = find_expert(row_tile, tiles, last, E_PAD)
    exists = expert < E
    start = tl.load(offset_ptr + expert, mask=exists, other=0)
    end = tl.load(offset_ptr + expert + 1, mask=exists, other=0)
    rows = start + (row_tile - first_tile) * BLOCK_N + tl.arange(0, BLOCK_N)
    return expert, rows.to(tl.int64), end


@triton.jit
def _grad_rows_kernel(
    dout_ptr, x_ptr, token_ptr, route_ptr, offset_ptr, weight_ptr, bias_ptr,  # (T, O), (T, D), ..., (E, O) or None
    dout_rows_ptr, x_rows_ptr,  # (N, O) or None, (N, D) or None
    score_ptr, partial_ptr,  # (N,) fp32, (row tiles, O) fp32; both None without a bias
    O, D, stride_ot, stride_xt,
    E: tl.constexpr, E_PAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Per row tile of one expert: sorted copies of dO and x, score[n] = <dO[n], b2[e]> and
    partial[tile] = sum_n s_n dO[n], whose sum over the expert's tiles is db2[e].

    Grid (cdiv(N, BLOCK_N) + E,); a program owns its rows; fp32 sums.
    """
    expert, rows, end = _expert_tile(offset_ptr, E, E_PAD, BLOCK_N)
    used = rows < end
    token = tl.load(token_ptr + rows, mask=used, other=0).to(tl.int64)
    score = tl.zeros((BLOCK_N,), dtype=tl.float32)
    weight = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if bias_ptr is not None:
        route = tl.load(route_ptr + rows, mask=used, other=0)
        weight = tl.load(weight_ptr + route, mask=used, other=0.0).to(tl.float32)
    for start in range(0, O, BLOCK_D):
        o = start + tl.arange(0, BLOCK_D)
        mask = used[:, None] & (o < O)[None, :]
        dout = tl.load(dout_ptr + token[:, None] * stride_ot + o[None, :], mask=mask, other=0.0)
        if dout_rows_ptr is not None:
            tl.store(dout_rows_ptr + rows[:, None] * O + o[None, :], dout, mask=mask)
        if bias_ptr is not None:
            dout = dout.to(tl.float32)
            bias = tl.load(bias_ptr + expert * O + o, mask=(o < O) & (expert < E), other=0.0).to(tl.float32)
            score += tl.sum(dout * bias[None, :], axis=1)
            # where, not weight 0: a masked row must not carry a NaN weight into the sum
            sums = tl.sum(tl.where(used[:, None], weight[:, None] * dout, 0.0), axis=0)
            tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * O + o, sums, mask=o < O)
    if bias_ptr is not None:
        tl.store(score_ptr + rows, score, mask=used)
    if x_rows_ptr is not None:
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            mask = used[:, None] & (d < D)[None, :]
            x = tl.load(x_ptr + token[:, None] * stride_xt + d[None, :], mask=mask, other=0.0)
            tl.store(x_rows_ptr + rows[:, None] * D + d[None, :], x, mask=mask)


class GradRows(NamedTuple):
    """What `grad_rows` leaves; None for what was not asked for."""

    dout_NO: Tensor | None
    x_ND: Tensor | None
    score_N: Tensor | None
    partial: Tensor | None
    partial_rows: int


def grad_rows(
    dout_TO: Tensor,
    x_TD: Tensor,
    token_N: Tensor,
    route_N: Tensor,
    offset_E1: Tensor,
    weight_TK: Tensor,
    bias_EO: Tensor | None,
    *,
    copy_dout: bool,
    copy_x: bool,
) -> GradRows:
    """Launch `_grad_rows_kernel`, if there is anything to do; rows of `dout_TO` and `x_TD` may be strided."""
    N, O, D = token_N.shape[0], dout_TO.shape[1], x_TD.shape[1]
    E = offset_E1.shape[0] - 1
    tile = tiling.grad_row_tile(N)
    row_tiles = tiling.cdiv(N, tile.BLOCK_N) + E
    rows = GradRows(
        dout_TO.new_empty(N, O) if copy_dout else None,
        x_TD.new_empty(N, D) if copy_x else None,
        None if bias_EO is None else dout_TO.new_empty(N, dtype=torch.float32),
        None if bias_EO is None else dout_TO.new_empty((row_tiles, O), dtype=torch.float32),
        tile.BLOCK_N,
    )
    if copy_dout or copy_x or bias_EO is not None:
        launch(
            _grad_rows_kernel, (row_tiles,),
            dout_TO, x_TD, token_N, route_N, offset_E1, weight_TK.contiguous(),
            bias_EO if bias_EO is None else bias_EO.contiguous(),
            rows.dout_NO, rows.x_ND, rows.score_N, rows.partial,
            O, D, dout_TO.stride(0), x_TD.stride(0),
            E=E, E_PAD=tiling.next_power_of_2(E), **tile.meta(),
        )  # fmt: skip
    return rows


@triton.jit
def _activation_grad_kernel(
    dh_ptr, z_ptr, offset_ptr, dz_ptr, partial_ptr,  # (N, F), (N, F), (E + 1,), (N, F), (row tiles, F) fp32
    F, stride_hn,
    ACTIVATION: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dz = dh act'(z), and the column sums of dz over each row tile of one expert.

    z, dz and partial may be None: no activation, gradient not wanted. Grid (cdiv(N, BLOCK_N) + E, cdiv(F, BLOCK_D)).
    """
    _, rows, end = _expert_tile(offset_ptr, E, E_PAD, BLOCK_N)
    f = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (rows < end)[:, None] & (f < F)[None, :]
    grad = tl.load(dh_ptr + rows[:, None] * stride_hn + f[None, :], mask=mask, other=0.0).to(tl.float32)
    if z_ptr is not None:
        z = tl.load(z_ptr + rows[:, None] * F + f[None, :], mask=mask, other=0.0).to(tl.float32)
        _, slope = activation_and_derivative(z, ACTIVATION)
        grad = tl.where(mask, grad * slope, 0.0)
    if dz_ptr is not None:
        tl.store(dz_ptr + rows[:, None] * F + f[None, :], narrow(grad, dz_ptr.dtype.element_ty), mask=mask)
    if partial_ptr is not None:
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * F + f, tl.sum(grad, axis=0), mask=f < F)


def activation_grad(
    dh_NF: Tensor, z_NF: Tensor | None, offset_E1: Tensor, activation: str | None, want_bias: bool
) -> tuple[Tensor, Tensor | None, int]:
    """Launch `_activation_grad_kernel` if needed; returns dz_NF, partial column sums or None, and rows per partial.

    `z_NF` is None where there was no activation; then dz is dh itself.
    """
    dh_NF = dh_NF if dh_NF.stride(1) == 1 else dh_NF.contiguous()
    N, F = dh_NF.shape
    E = offset_E1.shape[0] - 1
    tile = tiling.grad_row_tile(N)
    row_tiles = tiling.cdiv(N, tile.BLOCK_N) + E
    dz_NF = dh_NF if z_NF is None else dh_NF.new_empty(N, F)
    partial = dh_NF.new_empty((row_tiles, F), dtype=torch.float32) if want_bias else None
    if z_NF is not None or want_bias:
        launch(
            _activation_grad_kernel, (row_tiles, tiling.cdiv(F, tile.BLOCK_D)),
            dh_NF, z_NF, offset_E1, None if z_NF is None else dz_NF, partial, F, dh_NF.stride(0),
            ACTIVATION=activation, E=E, E_PAD=tiling.next_power_of_2(E), **tile.meta(),
        )  # fmt: skip
    return dz_NF, partial, tile.BLOCK_N
