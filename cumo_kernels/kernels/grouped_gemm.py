# SPDX-License-Identifier: Apache-2.0
"""Grouped GEMM over ragged groups of rows: y[n] = act(x[n] W[e]^T + b[e]) for the rows n of expert e.

One kernel serves the forward passes and the gradient of the input (W read the other way round, no bias). Rows
come from a contiguous tensor, through TMA descriptors or by pointers, or are gathered from the tokens on load.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cumo_kernels import tiling
from cumo_kernels.kernels.epilogues import activation, column_slices
from cumo_kernels.kernels.launch import can_use_tma, descriptor, launch, target_of
from cumo_kernels.kernels.numerics import dot, narrow
from cumo_kernels.kernels.schedule import expert_rows, locate


@triton.jit
def load_rows(
    x, x_rows, first_row, k, K,
    X_TMA: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x[rows, k : k + BLOCK_K]. By pointers, `x_rows` = (pointers to the rows, mask of the rows)."""
    if X_TMA:
        return x.load([first_row, k])
    else:
        columns = k + tl.arange(0, BLOCK_K)
        return tl.load(x_rows[0] + columns[None, :], mask=x_rows[1] & (columns < K)[None, :], other=0.0)


@triton.jit
def load_weights(
    w, expert, n, k, N, K, stride_we, stride_wn, stride_wk,
    W_TMA: tl.constexpr, W_NK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """W[expert, n : n + BLOCK_N, k : k + BLOCK_K] as [BLOCK_K, BLOCK_N]; W_NK: unit stride along k, else along n.

    The descriptor is three-dimensional, so that what lies past the edge of one expert reads as zero and never as
    the next expert's weights.
    """
    if W_TMA:
        if W_NK:
            return w.load([expert, n, k]).reshape(BLOCK_N, BLOCK_K).T
        else:
            return w.load([expert, k, n]).reshape(BLOCK_K, BLOCK_N)
    else:
        at_n = n + tl.arange(0, BLOCK_N)
        at_k = k + tl.arange(0, BLOCK_K)
        base = w + expert.to(tl.int64) * stride_we
        mask = (at_k < K)[:, None] & (at_n < N)[None, :]
        offset = at_k.to(tl.int64)[:, None] * stride_wk + at_n.to(tl.int64)[None, :] * stride_wn
        return tl.load(base + offset, mask=mask, other=0.0)


@triton.jit
def multiply_accumulate(x, w, acc, SWAP: tl.constexpr, PRECISION: tl.constexpr):
    """acc += x w, or with SWAP its transpose acc += w^T x^T, which fills tensor-core instructions of 64 rows with
    weights when there are only a few tokens."""
    if SWAP:
        return dot(w.T, x.T, acc, PRECISION)
    else:
        return dot(x, w, acc, PRECISION)


@triton.jit
def row_pointers(
    x, token_ptr, first_row, end, stride_xm, X_TMA: tl.constexpr, GATHER: tl.constexpr, BLOCK_M: tl.constexpr
):
    """(pointers to the first column of each row, mask of the rows), both [BLOCK_M, 1]; rows of tokens if GATHER."""
    rows = first_row + tl.arange(0, BLOCK_M)
    valid = rows < end
    if X_TMA:
        return rows[:, None], valid[:, None]
    else:
        if GATHER:
            rows = tl.load(token_ptr + rows, mask=valid, other=0)
        return x + rows.to(tl.int64)[:, None] * stride_xm, valid[:, None]


@triton.jit
def matmul_tile(
    x, w, token_ptr, expert, first_row, end, n, N, K, stride_xm, stride_we, stride_wn, stride_wk,
    X_TMA: tl.constexpr, W_TMA: tl.constexpr, W_NK: tl.constexpr, GATHER: tl.constexpr, SWAP: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x[rows] W[expert, n : n + BLOCK_N]^T [BLOCK_M, BLOCK_N], accumulated in fp32 in the order of k."""
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    x_rows = row_pointers(x, token_ptr, first_row, end, stride_xm, X_TMA, GATHER, BLOCK_M)
    for k in range(0, K, BLOCK_K):
        x_tile = load_rows(x, x_rows, first_row, k, K, X_TMA, BLOCK_K)
        w_tile = load_weights(w, expert, n, k, N, K, stride_we, stride_wn, stride_wk, W_TMA, W_NK, BLOCK_N, BLOCK_K)
        acc = multiply_accumulate(x_tile, w_tile, acc, SWAP, PRECISION)
    return acc.T if SWAP else acc


@triton.jit
def matmul_tile_gated(
    x, w, token_ptr, expert, first_row, end, n, N, K, stride_xm, stride_we, stride_wn, stride_wk,
    X_TMA: tl.constexpr, W_TMA: tl.constexpr, W_NK: tl.constexpr, GATHER: tl.constexpr, SWAP: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The tiles of gate and up projection, rows n and F + n of W[expert] with F = N, from one pass over x."""
    gate = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    x_rows = row_pointers(x, token_ptr, first_row, end, stride_xm, X_TMA, GATHER, BLOCK_M)
    for k in range(0, K, BLOCK_K):
        x_tile = load_rows(x, x_rows, first_row, k, K, X_TMA, BLOCK_K)
        w_tile = load_weights(w, expert, n, k, N, K, stride_we, stride_wn, stride_wk, W_TMA, W_NK, BLOCK_N, BLOCK_K)
        gate = multiply_accumulate(x_tile, w_tile, gate, SWAP, PRECISION)
        w_tile = load_weights(
            w, expert, N + n, k, 2 * N, K, stride_we, stride_wn, stride_wk, W_TMA, W_NK, BLOCK_N, BLOCK_K
        )
        up = multiply_accumulate(x_tile, w_tile, up, SWAP, PRECISION)
    if SWAP:
        return gate.T, up.T
    else:
        return gate, up


@triton.jit
def tile_of(ptr, first_row, width):
    """Pointer to row `first_row` of a matrix of `width` columns: the one int64 product of a tile, whose elements
    are then at int32 distances. z passes 2**31 elements at 37,000 tokens of Mixtral."""
    return ptr + first_row.to(tl.int64) * width


@triton.jit
def _store_slice(
    acc, bias_ptr, expert, z_ptr, out_ptr, first_row, rows, columns, N,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Some columns of z = acc + b[e] and out = act(z), for `rows` rows; what is None is not computed."""
    row = tl.arange(0, BLOCK_M)[:, None]
    mask = (row < rows) & (columns < N)[None, :]
    at = row * N + columns[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + expert * N + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if z_ptr is not None:
        tl.store(tile_of(z_ptr, first_row, N) + at, narrow(acc, z_ptr.dtype.element_ty), mask=mask)
    if out_ptr is not None:
        out = narrow(activation(acc, ACTIVATION), out_ptr.dtype.element_ty)
        tl.store(tile_of(out_ptr, first_row, N) + at, out, mask=mask)


@triton.jit
def _store_slice_gated(
    gate, up, bias_ptr, expert, z_ptr, out_ptr, first_row, rows, columns, N,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Some columns of both halves of z, and of out = act(z gate) z up."""
    row = tl.arange(0, BLOCK_M)[:, None]
    mask = (row < rows) & (columns < N)[None, :]
    if bias_ptr is not None:
        bias = bias_ptr + expert * (2 * N) + columns
        gate += tl.load(bias, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias + N, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if z_ptr is not None:
        z = tile_of(z_ptr, first_row, 2 * N) + row * (2 * N) + columns[None, :]
        tl.store(z, narrow(gate, z_ptr.dtype.element_ty), mask=mask)
        tl.store(z + N, narrow(up, z_ptr.dtype.element_ty), mask=mask)
    if out_ptr is not None:
        out = narrow(activation(gate, ACTIVATION) * up, out_ptr.dtype.element_ty)
        tl.store(tile_of(out_ptr, first_row, N) + row * N + columns[None, :], out, mask=mask)


@triton.jit(do_not_specialize=["M"])
def _grouped_gemm_kernel(
    x, w, bias_ptr, token_ptr, offset_ptr,  # (M | T, K), (E, N | 2N, K), (E, N | 2N), (M,) int32, (E + 1,) int32
    z_ptr, out_ptr,  # (M, N | 2N) or None, (M, N)
    M, N, K, stride_xm, stride_we, stride_wn, stride_wk,
    E: tl.constexpr, E_PAD: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    X_TMA: tl.constexpr, W_TMA: tl.constexpr, W_NK: tl.constexpr, GATHER: tl.constexpr, ZERO_TAIL: tl.constexpr,
    SWAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """z = x W[e]^T + b[e]; out = act(z), or act(z gate) * z up if GATED, over the rows of each expert.

    `x` and `w` are pointers or TMA descriptors. Persistent: grid (programs,), program p does tiles p, p + programs,
    ... of the list that `schedule.locate` defines, whose length only the device knows. A tile owns its part of z
    and out; with ZERO_TAIL the rows of no expert are set to zero. fp32 accumulation in the order of k.
    """
    tiles, last = expert_rows(offset_ptr, E, E_PAD, BLOCK_M)
    n_tiles = tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tl.sum(tiles, axis=0) * n_tiles, tl.num_programs(0)):
        expert, first_row, end, n_tile, _ = locate(tile, offset_ptr, tiles, last, n_tiles, E_PAD, BLOCK_M, GROUP_M)
        n = n_tile * BLOCK_N
        rows = end - first_row
        if GATED:
            gate, up = matmul_tile_gated(
                x, w, token_ptr, expert, first_row, end, n, N, K, stride_xm, stride_we, stride_wn, stride_wk,
                X_TMA, W_TMA, W_NK, GATHER, SWAP, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            gates, ups = column_slices(gate, BLOCK_M, BLOCK_N, SLICES), column_slices(up, BLOCK_M, BLOCK_N, SLICES)
            for i in tl.static_range(SLICES):
                columns = n + i * (BLOCK_N // SLICES) + tl.arange(0, BLOCK_N // SLICES)
                _store_slice_gated(
                    gates[i], ups[i], bias_ptr, expert, z_ptr, out_ptr, first_row, rows, columns, N, ACTIVATION, BLOCK_M
                )
        else:
            acc = matmul_tile(
                x, w, token_ptr, expert, first_row, end, n, N, K, stride_xm, stride_we, stride_wn, stride_wk,
                X_TMA, W_TMA, W_NK, GATHER, SWAP, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            slices = column_slices(acc, BLOCK_M, BLOCK_N, SLICES)
            for i in tl.static_range(SLICES):
                columns = n + i * (BLOCK_N // SLICES) + tl.arange(0, BLOCK_N // SLICES)
                _store_slice(
                    slices[i], bias_ptr, expert, z_ptr, out_ptr, first_row, rows, columns, N, ACTIVATION, BLOCK_M
                )
    if ZERO_TAIL:
        used = tl.load(offset_ptr + E)
        for tile in range(tl.program_id(0), tl.cdiv(M - used, BLOCK_M) * n_tiles, tl.num_programs(0)):
            rows = (used + (tile // n_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
            columns = (tile % n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
            zero = tl.zeros((BLOCK_M, BLOCK_N), dtype=out_ptr.dtype.element_ty)
            mask = (rows < M)[:, None] & (columns < N)[None, :]
            tl.store(out_ptr + rows[:, None] * N + columns[None, :], zero, mask=mask)


def is_transposed(w_ENK: Tensor) -> bool:
    """Whether a weight [E, N, K] is contiguous along N, and not along K."""
    return w_ENK.stride(2) != 1 and w_ENK.stride(1) == 1


class Weights:
    """A stacked weight [E, N, K] as the kernels want it: a pointer or TMA descriptor, strides, and which is unit.

    With `gated` its upper half is read from row N / 2.
    """

    def __init__(self, w_ENK: Tensor, tile: tiling.GemmTile, use_tma: bool, gated: bool = False) -> None:
        if w_ENK.stride(2) != 1 and w_ENK.stride(1) != 1:
            w_ENK = w_ENK.contiguous()
        self.tensor = w_ENK
        self.is_nk = not is_transposed(w_ENK)
        memory_order = w_ENK if self.is_nk else w_ENK.transpose(1, 2)
        # along the unit stride a descriptor reads from multiples of 16 bytes only
        half_is_aligned = self.is_nk or w_ENK.shape[1] // 2 * w_ENK.element_size() % 16 == 0
        self.tma = use_tma and can_use_tma(memory_order) and (half_is_aligned or not gated)
        block = [1, tile.BLOCK_N, tile.BLOCK_K] if self.is_nk else [1, tile.BLOCK_K, tile.BLOCK_N]
        self.argument = descriptor(memory_order, block) if self.tma else w_ENK

    def flags(self) -> dict[str, bool]:
        """The constexprs that say how to read it."""
        return {"W_TMA": self.tma, "W_NK": self.is_nk}


def dot_precision(dtype: torch.dtype) -> str:
    """How fp32 operands are multiplied: as PyTorch's own matmul is told to, by either of its interfaces. Products of
    narrower types are exact anyway."""
    # torch.get_float32_matmul_precision raises once the newer interface has been used
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def num_programs(target: tiling.Target, tile: tiling.GemmTile, rows: int, num_experts: int, columns: int) -> int:
    """Programs of a persistent launch: as many as fit on the device, at most one per tile of the worst routing."""
    row_tiles = min(tiling.cdiv(rows, tile.BLOCK_M) + num_experts, rows)
    return min(target.num_sms * tile.programs_per_sm, row_tiles * max(1, tiling.cdiv(columns, tile.BLOCK_N)))


def grouped_gemm_forward(
    x: Tensor,
    w_ENK: Tensor,
    offset_E1: Tensor,
    num_rows: int,
    *,
    bias_EN: Tensor | None = None,
    token_N: Tensor | None = None,
    activation: str | None = None,
    gated: bool = False,
    save_z: bool = False,
    only_z: bool = False,
    zero_tail: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Launch `_grouped_gemm_kernel`; returns (out, z), each None if it was not asked for.

    `x` holds the sorted rows [num_rows, K], or with `token_N` the tokens [T, K] to gather them from. With `gated`,
    `w_ENK` has 2 N rows, gate first, and z is [num_rows, 2 N].
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    E, N, K = w_ENK.shape
    out_columns = N // 2 if gated else N
    out = None if only_z else x.new_empty(num_rows, out_columns)
    z = x.new_empty(num_rows, N) if save_z or only_z else None
    target = target_of(x)
    kind = "gated" if gated else "forward"
    tile = tiling.gemm_tile(target, x.dtype, num_rows, E, out_columns, kind, K, is_transposed(w_ENK))
    w = Weights(w_ENK, tile, target.has_tma, gated)
    x_tma = target.has_tma and token_N is None and can_use_tma(x)
    launch(
        _grouped_gemm_kernel, (num_programs(target, tile, num_rows, E, out_columns),),
        descriptor(x, [tile.BLOCK_M, tile.BLOCK_K]) if x_tma else x, w.argument,
        bias_EN if bias_EN is None else bias_EN.contiguous(), token_N, offset_E1, z, out,
        num_rows, out_columns, K, x.stride(0), *w.tensor.stride(),
        E=E, E_PAD=tiling.next_power_of_2(E), ACTIVATION=activation, GATED=gated, X_TMA=x_tma, **w.flags(),
        GATHER=token_N is not None, ZERO_TAIL=zero_tail, SWAP=tile.SWAP, PRECISION=dot_precision(x.dtype),
        SLICES=tile.SLICES, **tile.meta(),
    )  # fmt: skip
    return out, z
