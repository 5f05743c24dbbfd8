# SPDX-License-Identifier: Apache-2.0
"""The gating with its linear layer inside: tokens are read once, for logits, selection and losses together; in the
backward once more, for both gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cumo_kernels import tiling
from cumo_kernels.kernels.gating import TL_DTYPES, finish_losses, new_routing, route_block, store_sums
from cumo_kernels.kernels.launch import launch, target_of
from cumo_kernels.kernels.numerics import dot, narrow


@triton.jit(do_not_specialize=["segment", "blocks"])
def _linear_gating_kernel(
    x_ptr, gate_ptr, logits_ptr,  # (T, D), (E, D), (T, E) fp32
    weight_ptr, expert_ptr, sums_ptr,  # (T, K) probs_dtype, (T, K) int32, (S * blocks, 2 E + 1) fp32
    D, stride_xt, stride_ge, segment, blocks,
    E: tl.constexpr, K: tl.constexpr, E_PAD: tl.constexpr, K_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    NORMALIZE: tl.constexpr, PROBS_DTYPE: tl.constexpr,
):  # fmt: skip
    """logits = x gate^T; then as `_topk_gating_kernel`.

    Grid (S * blocks,); a program owns one block of tokens of one segment. Products are those of fp32, also where
    matmuls may round them (TF32), for that would change which experts are chosen; sums in fp32 in the order of d.
    E_PAD is at least 16, the least width of a matrix product.
    """
    program = tl.program_id(0).to(tl.int64)
    i = (program % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    t = (program // blocks) * segment + i
    e = tl.arange(0, E_PAD)
    logits = tl.zeros((BLOCK_T, E_PAD), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(
            x_ptr + t[:, None] * stride_xt + d[None, :], mask=(i < segment)[:, None] & (d < D)[None, :], other=0.0
        )
        gate = tl.load(
            gate_ptr + e[:, None] * stride_ge + d[None, :], mask=(e < E)[:, None] & (d < D)[None, :], other=0.0
        )
        if x.dtype != gate.dtype:
            x, gate = x.to(tl.float32), gate.to(tl.float32)
        logits = dot(x, gate.T, logits, "ieee")
    mask = (i < segment)[:, None] & (e < E)[None, :]
    tl.store(logits_ptr + t[:, None] * E + e[None, :], logits, mask=mask)
    p, f, z = route_block(
        logits, t, i < segment, weight_ptr, expert_ptr, E, K, E_PAD, K_PAD, BLOCK_T, NORMALIZE, PROBS_DTYPE
    )
    store_sums(p, f, z, program, sums_ptr, E, E_PAD)


def linear_gating_forward(
    x_TD: Tensor, gate_ED: Tensor, top_k: int, segment: int, normalize: bool, probs_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Two launches: gating and losses; returns the fields of `Routing`, share_SE and logits_TE."""
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    gate_ED = gate_ED if gate_ED.stride(1) == 1 else gate_ED.contiguous()
    (T, D), E = x_TD.shape, gate_ED.shape[0]
    routing = new_routing(x_TD, E, top_k, segment, probs_dtype)
    weight_TK, expert_TK, *losses = routing
    logits_TE = x_TD.new_empty((T, E), dtype=torch.float32)
    if T == 0:
        return *routing, logits_TE
    tile = tiling.linear_gating_tile(target_of(x_TD), E)
    blocks = tiling.cdiv(segment, tile.BLOCK_T)
    sums = x_TD.new_empty((T // segment * blocks, 2 * E + 1), dtype=torch.float32)
    launch(
        _linear_gating_kernel, (T // segment * blocks,),
        x_TD, gate_ED, logits_TE, weight_TK, expert_TK, sums, D, x_TD.stride(0), gate_ED.stride(0), segment, blocks,
        E=E, K=top_k, E_PAD=max(16, tiling.next_power_of_2(E)), K_PAD=tiling.next_power_of_2(top_k),
        NORMALIZE=normalize, PROBS_DTYPE=TL_DTYPES[probs_dtype], **tile.meta(),
    )  # fmt: skip
    finish_losses(sums, losses, segment, blocks)
    return *routing, logits_TE


@triton.jit(do_not_specialize=["T"])
def _linear_gating_backward_kernel(
    dlogits_ptr, x_ptr, gate_ptr,  # (T, E) fp32, (T, D), (E, D)
    dx_ptr, partial_ptr,  # (T, D) or None, (chunks, E, D) fp32 or None
    T, D, stride_xt, stride_ge,
    E: tl.constexpr, E_PAD: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx = dlogits gate, and of each chunk of tokens its part of dgate = dlogits^T x.

    Grid (cdiv(T, CHUNK), cdiv(D, BLOCK_D)); a program owns CHUNK rows and BLOCK_D columns of dx, and those columns of
    its chunk's partial sum: no atomics. Products of fp32, as in the forward; sums in fp32 in the order of t.
    """
    e = tl.arange(0, E_PAD)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    of_gate = (e < E)[:, None] & (d < D)[None, :]
    if dx_ptr is not None:
        gate = tl.load(gate_ptr + e[:, None] * stride_ge + d[None, :], mask=of_gate, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK_D, E_PAD), dtype=tl.float32)
    for start in range(0, CHUNK, BLOCK_T):
        t = tl.program_id(0).to(tl.int64) * CHUNK + start + tl.arange(0, BLOCK_T)
        mask = (t < T)[:, None] & (d < D)[None, :]
        in_logits = (t < T)[:, None] & (e < E)[None, :]
        dlogits = tl.load(dlogits_ptr + t[:, None] * E + e[None, :], mask=in_logits, other=0.0)
        if dx_ptr is not None:
            dx = dot(dlogits, gate, tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32), "ieee")
            tl.store(dx_ptr + t[:, None] * D + d[None, :], narrow(dx, dx_ptr.dtype.element_ty), mask=mask)
        if partial_ptr is not None:
            x = tl.load(x_ptr + t[:, None] * stride_xt + d[None, :], mask=mask, other=0.0).to(tl.float32)
            acc = dot(x.T, dlogits, acc, "ieee")
    if partial_ptr is not None:
        first = tl.program_id(0).to(tl.int64) * E
        tl.store(partial_ptr + (first + e)[:, None] * D + d[None, :], acc.T, mask=of_gate)


def linear_gating_backward(
    dlogits_TE: Tensor, x_TD: Tensor, gate_ED: Tensor, need_x: bool, need_gate: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Launch the kernel and sum over chunks; returns dx_TD and dgate_ED in the dtypes of what they are gradients of."""
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    gate_ED = gate_ED if gate_ED.stride(1) == 1 else gate_ED.contiguous()
    (T, D), E = x_TD.shape, gate_ED.shape[0]
    tile = tiling.linear_gating_backward_tile(T, E)
    chunks = tiling.cdiv(T, tile.CHUNK)
    dx_TD = x_TD.new_empty(T, D) if need_x else None
    partial = x_TD.new_empty((chunks, E, D), dtype=torch.float32) if need_gate else None
    launch(
        _linear_gating_backward_kernel, (chunks, tiling.cdiv(D, tile.BLOCK_D)),
        dlogits_TE, x_TD, gate_ED, dx_TD, partial, T, D, x_TD.stride(0), gate_ED.stride(0),
        E=E, E_PAD=max(16, tiling.next_power_of_2(E)), **tile.meta(),
    )  # fmt: skip
    return dx_TD, None if partial is None else partial.sum(dim=0).to(gate_ED.dtype)
