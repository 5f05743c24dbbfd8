# SPDX-License-Identifier: Apache-2.0
"""Gradient of stacked weights: dW[e] = sum over the rows n of expert e of g[n]^T x[n], a GEMM with ragged K."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cumo_kernels import tiling
from cumo_kernels.kernels.grouped_gemm import dot_precision
from cumo_kernels.kernels.launch import can_use_tma, descriptor, launch, target_of
from cumo_kernels.kernels.numerics import dot, narrow
from cumo_kernels.kernels.schedule import expert_rows, swizzle


@triton.jit
def _load_block(
    base, token_ptr, row, end, columns, width, stride, GATHER: tl.constexpr, MASK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """base[rows, columns] [BLOCK_K, columns] by pointers; rows past `end` are zero if MASK_ROWS, else not looked at."""
    rows = row + tl.arange(0, BLOCK_K)
    mask = (columns < width)[None, :]
    if MASK_ROWS:
        mask = mask & (rows < end)[:, None]
    if GATHER:
        if MASK_ROWS:
            rows = tl.load(token_ptr + rows, mask=rows < end, other=0)
        else:
            rows = tl.load(token_ptr + rows)
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _sum_partials(partial_ptr, first, count, columns, width, BLOCK_P: tl.constexpr):
    """Sum of partial[first : first + count, columns] over its rows, blockwise in a fixed order."""
    total = tl.zeros_like(columns).to(tl.float32)
    for start in range(0, count, BLOCK_P):
        i = start + tl.arange(0, BLOCK_P)
        at = (first + i).to(tl.int64)[:, None] * width + columns[None, :]
        block = tl.load(partial_ptr + at, mask=(i < count)[:, None] & (columns < width)[None, :], other=0.0)
        total += tl.sum(block, axis=0)
    return total


@triton.jit
def _grouped_wgrad_kernel(
    g, g_ptr, x, x_ptr, token_ptr, offset_ptr,  # (rows, M), (rows, N): pointers and, for whole blocks, descriptors
    dw_ptr, partial_ptr, dbias_ptr,  # (E, M, N), (row tiles, M) fp32 or None, (E, M) or None
    M, N, stride_gk, stride_xk,
    E: tl.constexpr, E_PAD: tl.constexpr, PARTIAL_ROWS: tl.constexpr,
    G_TMA: tl.constexpr, X_TMA: tl.constexpr, G_GATHER: tl.constexpr, X_GATHER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """dW[e, m, n] = sum_row g[row, m] x[row, n]; dbias[e, m] = sum of the partial column sums of e's row tiles.

    Grid (E * cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N),); a program owns one tile of one expert's dW and walks the rows
    of the expert in order, accumulating in fp32: no atomics, and an expert without rows gets zeros. Whole blocks
    of rows need no row mask; the tail is loaded by pointers with one. The first column of programs of each expert,
    which there is also if N = 0, finishes its bias gradient too.
    """
    m_tiles, n_tiles = tl.cdiv(M, BLOCK_M), tl.maximum(tl.cdiv(N, BLOCK_N), 1)
    expert = tl.program_id(0) // (m_tiles * n_tiles)
    m_tile, n_tile = swizzle(tl.program_id(0) % (m_tiles * n_tiles), m_tiles, n_tiles, GROUP_M)
    m, n = m_tile * BLOCK_M, n_tile * BLOCK_N
    at_m, at_n = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
    start, end = tl.load(offset_ptr + expert), tl.load(offset_ptr + expert + 1)
    if partial_ptr is not None:
        if n_tile == 0:
            tiles, last = expert_rows(offset_ptr, E, E_PAD, PARTIAL_ROWS)
            before = tl.sum(tl.where(tl.arange(0, E_PAD) < expert, tiles, 0), axis=0)
            count = (end - start + PARTIAL_ROWS - 1) // PARTIAL_ROWS
            total = _sum_partials(partial_ptr, before, count, at_m, M, 64)
            tl.store(dbias_ptr + expert * M + at_m, narrow(total, dbias_ptr.dtype.element_ty), mask=at_m < M)
    if N == 0:
        end = start  # the bias gradient alone: no rows to walk
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    whole = (end - start) // BLOCK_K * BLOCK_K
    for row in range(start, start + whole, BLOCK_K):
        if G_TMA:
            g_tile = g.load([row, m])
        else:
            g_tile = _load_block(g_ptr, token_ptr, row, end, at_m, M, stride_gk, G_GATHER, False, BLOCK_K)
        if X_TMA:
            x_tile = x.load([row, n])
        else:
            x_tile = _load_block(x_ptr, token_ptr, row, end, at_n, N, stride_xk, X_GATHER, False, BLOCK_K)
        acc = dot(g_tile.T, x_tile, acc, PRECISION)
    if start + whole < end:
        g_tile = _load_block(g_ptr, token_ptr, start + whole, end, at_m, M, stride_gk, G_GATHER, True, BLOCK_K)
        x_tile = _load_block(x_ptr, token_ptr, start + whole, end, at_n, N, stride_xk, X_GATHER, True, BLOCK_K)
        acc = dot(g_tile.T, x_tile, acc, PRECISION)
    at = expert.to(tl.int64) * M * N + at_m.to(tl.int64)[:, None] * N + at_n[None, :]
    tl.store(dw_ptr + at, narrow(acc, dw_ptr.dtype.element_ty), mask=(at_m < M)[:, None] & (at_n < N)[None, :])


def grouped_wgrad(
    g: Tensor,
    x: Tensor | None,
    offset_E1: Tensor,
    *,
    token_N: Tensor | None = None,
    gather_g: bool = False,
    gather_x: bool = False,
    partial: Tensor | None = None,
    partial_rows: int = 1,
) -> tuple[Tensor | None, Tensor | None]:
    """Launch `_grouped_wgrad_kernel`; returns dW [E, M, N] and, from `partial`, dbias [E, M], in the dtype of `g`; each
    None without `x` or `partial`.

    `g` and `x` hold sorted rows, or tokens to gather them from (`gather_g`, `gather_x`, with `token_N`). `partial`
    [row tiles, M] holds the column sums of g over tiles of `partial_rows` rows, expert by expert.
    """
    g = g if g.stride(1) == 1 else g.contiguous()
    want_dw = x is not None
    x = g[:, :0] if x is None else x if x.stride(1) == 1 else x.contiguous()
    E, M, N = offset_E1.shape[0] - 1, g.shape[1], x.shape[1]
    num_rows = g.shape[0] if token_N is None else token_N.shape[0]
    dw = g.new_empty(E, M, N)
    dbias = None if partial is None else g.new_empty(E, M)
    target = target_of(g)
    tile = tiling.gemm_tile(target, g.dtype, num_rows, E, N, "wgrad", M)
    g_tma = target.has_tma and not gather_g and can_use_tma(g)
    x_tma = target.has_tma and not gather_x and can_use_tma(x)
    launch(
        _grouped_wgrad_kernel, (E * tiling.cdiv(M, tile.BLOCK_M) * max(1, tiling.cdiv(N, tile.BLOCK_N)),),
        descriptor(g, [tile.BLOCK_K, tile.BLOCK_M]) if g_tma else g, g,
        descriptor(x, [tile.BLOCK_K, tile.BLOCK_N]) if x_tma else x, x,
        token_N, offset_E1, dw, partial, dbias, M, N, g.stride(0), x.stride(0),
        E=E, E_PAD=tiling.next_power_of_2(E), PARTIAL_ROWS=partial_rows, G_TMA=g_tma, X_TMA=x_tma,
        G_GATHER=gather_g, X_GATHER=gather_x, PRECISION=dot_precision(g.dtype), **tile.meta(),
    )  # fmt: skip
    return dw if want_dw else None, dbias
