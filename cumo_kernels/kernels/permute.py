# SPDX-License-Identifier: Apache-2.0
"""Row movers: tokens into expert-sorted rows, and rows back into tokens as a sum over the K choices."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cumo_kernels import tiling
from cumo_kernels.kernels.launch import launch
from cumo_kernels.kernels.numerics import narrow


@triton.jit(do_not_specialize=["N"])
def _permute_kernel(
    x_ptr, token_ptr, out_ptr,  # (T, D), (N,) int32, (N, D)
    N, D, stride_xt,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[n, :] = x[token[n], :], zero where token[n] is -1.

    Grid (cdiv(N, BLOCK_N), cdiv(D, BLOCK_D)); a program owns one tile of `out`.
    """
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    token = tl.load(token_ptr + n, mask=n < N, other=-1).to(tl.int64)
    mask = (d < D)[None, :]
    x = tl.load(x_ptr + token[:, None] * stride_xt + d[None, :], mask=(token >= 0)[:, None] & mask, other=0.0)
    tl.store(out_ptr + n[:, None] * D + d[None, :], x, mask=(n < N)[:, None] & mask)


def permute_forward(x_TD: Tensor, token_N: Tensor) -> Tensor:
    """Launch `_permute_kernel`; returns x_ND. Rows of `x_TD` may be strided."""
    N, D = token_N.shape[0], x_TD.shape[1]
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    x_ND = x_TD.new_empty(N, D)
    tile = tiling.row_tile(D)
    grid = tiling.cdiv(N, tile.BLOCK_N), tiling.cdiv(D, tile.BLOCK_D)
    launch(_permute_kernel, grid, x_TD, token_N, x_ND, N, D, x_TD.stride(0), **tile.meta())
    return x_ND


@triton.jit(do_not_specialize=["T", "N"])
def _combine_kernel(
    y_ptr, weight_ptr, slot_ptr, residual_ptr,  # (N, D), (T, K) or None, (T, K) int32, (T, D) or None
    out_ptr,  # (T, D)
    score_ptr, dweight_ptr,  # (P, N) fp32 or None, (T, K) or None
    T, D, N, stride_yn, stride_rt,
    K: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[t, :] = residual[t, :] + sum_k weight[t, k] y[slot[t, k], :]; weight 1 and residual 0 where None.

    Slots of -1 are left out. In the backward pass of the whole layer the first column of programs also collects
    the gradient of the weights, dweight[t, k] = sum_p score[p, slot[t, k]].
    Grid (cdiv(T, BLOCK_N), cdiv(D, BLOCK_D)), of at least one column; a program owns one tile of `out`: no atomics,
    fp32 sums in the order of k (and p), hence bitwise reproducible.
    """
    t = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    tile = (t < T)[:, None] & (d < D)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + t[:, None] * stride_rt + d[None, :], mask=tile, other=0.0).to(tl.float32)
    for k in tl.range(0, K, loop_unroll_factor=min(K, 8)):
        # int64: slot * stride_yn passes 2**31 at N = 524288 rows of D = 4096
        slot = tl.load(slot_ptr + t * K + k, mask=t < T, other=-1).to(tl.int64)
        used = slot >= 0
        y = tl.load(y_ptr + slot[:, None] * stride_yn + d[None, :], mask=used[:, None] & tile, other=0.0)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + t * K + k, mask=used, other=0.0).to(tl.float32)
            acc += weight[:, None] * y.to(tl.float32)
        else:
            acc += y.to(tl.float32)
        if score_ptr is not None:
            first = used & (tl.program_id(1) == 0)
            score = tl.zeros((BLOCK_N,), dtype=tl.float32)
            for p in range(P):
                score += tl.load(score_ptr + p * N.to(tl.int64) + slot, mask=first, other=0.0)
            score = narrow(score, dweight_ptr.dtype.element_ty)
            tl.store(dweight_ptr + t * K + k, score, mask=(t < T) & (tl.program_id(1) == 0))
    tl.store(out_ptr + t[:, None] * D + d[None, :], narrow(acc, out_ptr.dtype.element_ty), mask=tile)


def combine_forward(
    y_ND: Tensor,
    slot_TK: Tensor,
    weight_TK: Tensor | None = None,
    residual_TD: Tensor | None = None,
    score_PN: Tensor | None = None,
    dweight_TK: Tensor | None = None,
) -> Tensor:
    """Launch `_combine_kernel`; returns out_TD in the dtype of `y_ND`. With `score_PN`, fills `dweight_TK` as well."""
    T, K = slot_TK.shape
    N, D = y_ND.shape
    out_TD = y_ND.new_empty(T, D)
    if residual_TD is not None and residual_TD.stride(1) != 1:
        residual_TD = residual_TD.contiguous()
    y_ND = y_ND if y_ND.stride(1) == 1 else y_ND.contiguous()
    tile = tiling.row_tile(D)
    launch(
        _combine_kernel, (tiling.cdiv(T, tile.BLOCK_N), max(1, tiling.cdiv(D, tile.BLOCK_D))),
        y_ND, weight_TK if weight_TK is None else weight_TK.contiguous(), slot_TK, residual_TD,
        out_TD, score_PN, dweight_TK,
        T, D, N, y_ND.stride(0), 0 if residual_TD is None else residual_TD.stride(0),
        K=K, P=0 if score_PN is None else score_PN.shape[0], **tile.meta(),
    )  # fmt: skip
    return out_TD


@triton.jit(do_not_specialize=["N"])
def _combine_backward_kernel(
    dout_ptr, y_ptr, weight_ptr, token_ptr, route_ptr,  # (T, D), (N, D), (T, K), (N,), (N,) int32
    dy_ptr, dweight_ptr,  # (N, D), (T, K)
    N, D, stride_ot, stride_yn,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dy[n, :] = weight[route[n]] dout[token[n], :]; dweight[route[n]] = <dout[token[n], :], y[n, :]>; 0 if token -1.

    Grid (cdiv(N, BLOCK_N),); a program owns whole rows, and `route` is a permutation: every element is written
    once. fp32 sums.
    """
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.load(token_ptr + n, mask=n < N, other=-1).to(tl.int64)
    route = tl.load(route_ptr + n, mask=n < N, other=0)
    used = token >= 0
    weight = tl.load(weight_ptr + route, mask=used, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = used[:, None] & (d < D)[None, :]
        dout = tl.load(dout_ptr + token[:, None] * stride_ot + d[None, :], mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + n[:, None] * stride_yn + d[None, :], mask=mask, other=0.0).to(tl.float32)
        dweight += tl.sum(dout * y, axis=1)
        dy = narrow(weight[:, None] * dout, dy_ptr.dtype.element_ty)
        tl.store(dy_ptr + n[:, None] * D + d[None, :], dy, mask=(n < N)[:, None] & (d < D)[None, :])
    tl.store(dweight_ptr + route, narrow(dweight, dweight_ptr.dtype.element_ty), mask=n < N)


def combine_backward(
    dout_TD: Tensor, y_ND: Tensor, weight_TK: Tensor, token_N: Tensor, route_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Launch `_combine_backward_kernel`; returns dy_ND and dweight_TK in the dtypes of `y_ND` and `weight_TK`."""
    N, D = y_ND.shape
    dout_TD = dout_TD if dout_TD.stride(1) == 1 else dout_TD.contiguous()
    y_ND = y_ND if y_ND.stride(1) == 1 else y_ND.contiguous()
    weight_TK = weight_TK.contiguous()
    dy_ND, dweight_TK = y_ND.new_empty(N, D), weight_TK.new_empty(weight_TK.shape)
    tile = tiling.row_tile(D)
    launch(
        _combine_backward_kernel, (tiling.cdiv(N, tile.BLOCK_N),),
        dout_TD, y_ND, weight_TK, token_N, route_N, dy_ND, dweight_TK,
        N, D, dout_TD.stride(0), y_ND.stride(0), **tile.meta(),
    )  # fmt: skip
    return dy_ND, dweight_TK
