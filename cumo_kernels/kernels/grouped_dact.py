# SPDX-License-Identifier: Apache-2.0
"""Backward through the down projection and the activation in one kernel.

The formulation is that of SonicMoE (arXiv 2512.14080). It needs neither the activation nor the output of the expert:
the former is recomputed from the saved pre-activation z, and the gradient of the gate weight follows from
<dO W2, a> = <dO, W2 a>.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cumo_kernels import tiling
from cumo_kernels.kernels.epilogues import activation_and_derivative, column_slices
from cumo_kernels.kernels.grouped_gemm import (
    Weights,
    dot_precision,
    is_transposed,
    matmul_tile,
    num_programs,
    tile_of,
)
from cumo_kernels.kernels.launch import can_use_tma, descriptor, launch, target_of
from cumo_kernels.kernels.numerics import narrow
from cumo_kernels.kernels.schedule import expert_rows, locate


@triton.jit
def _store_column_sums(partial_ptr, row_tile, width, values, valid_rows, columns, N):
    """partial[row_tile, columns] = sum of `values` over the tile's valid rows."""
    sums = tl.sum(tl.where(valid_rows[:, None], values, 0.0), axis=0)
    tl.store(partial_ptr + row_tile.to(tl.int64) * width + columns, sums, mask=columns < N)


@triton.jit
def _dact_slice(
    da, s, z_ptr, dz_ptr, a_ptr, partial_ptr, row_tile, first_row, rows, columns, N,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Finish some columns of a tile of da = dO W2; returns <da, a> of each row over them."""
    row = tl.arange(0, BLOCK_M)
    valid = row < rows
    mask = valid[:, None] & (columns < N)[None, :]
    width = 2 * N if GATED else N
    at = row[:, None] * width + columns[None, :]
    z = tile_of(z_ptr, first_row, width) + at
    dz = tile_of(dz_ptr, first_row, width) + at
    value, slope = activation_and_derivative(tl.load(z, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
    if GATED:
        up = tl.load(z + N, mask=mask, other=0.0).to(tl.float32)
        a = value * up
        dgate = s[:, None] * da * up * slope
        dup = s[:, None] * da * value
        tl.store(dz, narrow(dgate, dz_ptr.dtype.element_ty), mask=mask)
        tl.store(dz + N, narrow(dup, dz_ptr.dtype.element_ty), mask=mask)
        if partial_ptr is not None:
            _store_column_sums(partial_ptr, row_tile, width, dgate, valid, columns, N)
            _store_column_sums(partial_ptr + N, row_tile, width, dup, valid, columns, N)
    else:
        a = value
        dvalue = s[:, None] * da * slope
        tl.store(dz, narrow(dvalue, dz_ptr.dtype.element_ty), mask=mask)
        if partial_ptr is not None:
            _store_column_sums(partial_ptr, row_tile, width, dvalue, valid, columns, N)
    if a_ptr is not None:
        at = row[:, None] * N + columns[None, :]
        tl.store(tile_of(a_ptr, first_row, N) + at, narrow(s[:, None] * a, a_ptr.dtype.element_ty), mask=mask)
    return tl.sum(tl.where(mask, da * a, 0.0), axis=1)


@triton.jit(do_not_specialize=["M"])
def _grouped_dact_kernel(
    dout, w, token_ptr, offset_ptr, weight_ptr, route_ptr,  # (M | T, K), (E, N, K), (M,), (E + 1,), (T * k,), (M,)
    z_ptr, dz_ptr, a_ptr,  # (M, N | 2N), (M, N | 2N), (M, N) or None
    bias_score_ptr, score_ptr, partial_ptr,  # (M,), (n_tiles, M), (row tiles, N | 2N): fp32 or None
    M, N, K, stride_xm, stride_we, stride_wn, stride_wk,
    E: tl.constexpr, E_PAD: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    X_TMA: tl.constexpr, W_TMA: tl.constexpr, W_NK: tl.constexpr, GATHER: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """da = dO[rows] W2[e]; with the gate weight s of each row and a = act(z):
    dz = s da act'(z), a' = s a (for dW2), score[n_tile, row] = <da, a> (+ bias_score[row] where n_tile is 0),
    partial[row_tile] = column sums of dz.

    If GATED, a = act(z gate) z up and dz has both halves. K is the output width, N the hidden width. Schedule as in
    `_grouped_gemm_kernel`, but a width of zero has a column of tiles too, for the scores. A tile owns its part of every
    output (sums across tiles are left to later kernels), so nothing is atomic. The epilogue goes by SLICES of columns,
    for it would not fit in registers at once.
    """
    tiles, last = expert_rows(offset_ptr, E, E_PAD, BLOCK_M)
    n_tiles = tl.maximum(tl.cdiv(N, BLOCK_N), 1)
    for tile in range(tl.program_id(0), tl.sum(tiles, axis=0) * n_tiles, tl.num_programs(0)):
        expert, first_row, end, n_tile, row_tile = locate(
            tile, offset_ptr, tiles, last, n_tiles, E_PAD, BLOCK_M, GROUP_M
        )
        da = matmul_tile(
            dout, w, token_ptr, expert, first_row, end, n_tile * BLOCK_N, N, K,
            stride_xm, stride_we, stride_wn, stride_wk,
            X_TMA, W_TMA, W_NK, GATHER, False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        rows = (first_row + tl.arange(0, BLOCK_M)).to(tl.int64)
        route = tl.load(route_ptr + rows, mask=rows < end, other=0)
        s = tl.load(weight_ptr + route, mask=rows < end, other=0.0).to(tl.float32)
        slices = column_slices(da, BLOCK_M, BLOCK_N, SLICES)
        score = tl.zeros((BLOCK_M,), dtype=tl.float32)
        for i in tl.static_range(SLICES):
            columns = n_tile * BLOCK_N + i * (BLOCK_N // SLICES) + tl.arange(0, BLOCK_N // SLICES)
            score += _dact_slice(
                slices[i], s, z_ptr, dz_ptr, a_ptr, partial_ptr, row_tile, first_row, end - first_row, columns, N,
                ACTIVATION, GATED, BLOCK_M,
            )  # fmt: skip
        if score_ptr is not None:
            if bias_score_ptr is not None:
                score += tl.load(bias_score_ptr + rows, mask=(rows < end) & (n_tile == 0), other=0.0)
            tl.store(score_ptr + n_tile * M.to(tl.int64) + rows, score, mask=rows < end)


def grouped_dact(
    dout: Tensor,
    w2_EFO: Tensor,
    offset_E1: Tensor,
    weight_TK: Tensor,
    route_N: Tensor,
    z: Tensor,
    *,
    token_N: Tensor | None,
    bias_score_N: Tensor | None,
    activation: str,
    gated: bool,
    want_a: bool,
    want_score: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, int]:
    """Launch `_grouped_dact_kernel`; returns dz, a', score, the partial column sums of dz and the rows per partial.

    `dout` holds sorted rows [N, O], or with `token_N` the tokens [T, O]. `w2_EFO` is W2 [E, O, F] transposed.
    score [n_tiles, N] summed over its first dimension is the gradient of the gate weight of each row.
    """
    dout = dout if dout.stride(1) == 1 else dout.contiguous()
    E, F, O = w2_EFO.shape
    num_rows = z.shape[0]
    target = target_of(dout)
    kind = "dact_gated" if gated else "dact"
    tile = tiling.gemm_tile(target, dout.dtype, num_rows, E, F, kind, O, is_transposed(w2_EFO))
    w = Weights(w2_EFO, tile, target.has_tma)
    x_tma = target.has_tma and token_N is None and can_use_tma(dout)
    n_tiles, row_tiles = max(1, tiling.cdiv(F, tile.BLOCK_N)), tiling.cdiv(num_rows, tile.BLOCK_M) + E
    dz = z.new_empty(z.shape)
    a = z.new_empty(num_rows, F) if want_a else None
    score = z.new_empty((n_tiles, num_rows), dtype=torch.float32) if want_score else None
    partial = z.new_empty((row_tiles, z.shape[1]), dtype=torch.float32) if want_bias else None
    launch(
        _grouped_dact_kernel, (num_programs(target, tile, num_rows, E, F),),
        descriptor(dout, [tile.BLOCK_M, tile.BLOCK_K]) if x_tma else dout, w.argument,
        token_N, offset_E1, weight_TK.contiguous(), route_N, z, dz, a, bias_score_N, score, partial,
        num_rows, F, O, dout.stride(0), *w.tensor.stride(),
        E=E, E_PAD=tiling.next_power_of_2(E), ACTIVATION=activation, GATED=gated, X_TMA=x_tma, **w.flags(),
        GATHER=token_N is not None, PRECISION=dot_precision(dout.dtype), SLICES=tile.SLICES, **tile.meta(),
    )  # fmt: skip
    return dz, a, score, partial, tile.BLOCK_M
