# SPDX-License-Identifier: Apache-2.0
"""Top-K gating: logits -> weights, experts, balance and z-loss of each segment, in one pass; and its gradient.

A block of tokens never crosses the edge of a segment. Where one program can walk a whole segment, the losses
are finished there; else every block writes its sums and a second, tiny kernel adds them up in block order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cumo_kernels import tiling
from cumo_kernels.kernels.launch import launch
from cumo_kernels.kernels.numerics import narrow, round_to


@triton.jit
def _softmax(logits, valid):
    """Row softmax and logsumexp of fp32 `logits` [BLOCK_T, E_PAD], where `valid` marks the E real columns."""
    logits = tl.where(valid, logits, float("-inf"))
    top = tl.max(logits, axis=1)
    exps = tl.exp(logits - top[:, None])
    total = tl.sum(exps, axis=1)
    # tl.max may drop a NaN; the sum does not, and a row of probabilities is NaN as a whole
    return exps / total[:, None], top + tl.log(total)


@triton.jit
def _select(probs, valid_te, K: tl.constexpr, K_PAD: tl.constexpr, E_PAD: tl.constexpr, BLOCK_T: tl.constexpr):
    """K rounds of (max, lowest index): the top-K probabilities and experts [BLOCK_T, K_PAD].

    Keys of unavailable columns lie below those of probabilities and NaN, so that every round finds a new expert.
    """
    e = tl.arange(0, E_PAD)[None, :]
    k = tl.arange(0, K_PAD)[None, :]
    key = tl.where(valid_te, tl.where(probs == probs, probs, -1.0), -2.0)
    top_p = tl.zeros((BLOCK_T, K_PAD), dtype=tl.float32)
    top_e = tl.zeros((BLOCK_T, K_PAD), dtype=tl.int32)
    for i in range(K):
        best = tl.max(key, axis=1)
        expert = tl.min(tl.where(key == best[:, None], e, E_PAD), axis=1)
        taken = e == expert[:, None]
        prob = tl.sum(tl.where(taken, probs, 0.0), axis=1)
        top_p = tl.where(k == i, prob[:, None], top_p)
        top_e = tl.where(k == i, expert[:, None], top_e)
        key = tl.where(taken, -2.0, key)
    return top_p, top_e


@triton.jit
def route_block(
    logits, t, in_segment, weight_ptr, expert_ptr,
    E: tl.constexpr, K: tl.constexpr, E_PAD: tl.constexpr, K_PAD: tl.constexpr, BLOCK_T: tl.constexpr,
    NORMALIZE: tl.constexpr, PROBS_DTYPE: tl.constexpr,
):  # fmt: skip
    """Route the tokens `t` of one block; returns its sums of probabilities [E_PAD], of first choices [E_PAD] and
    of squared logsumexp, for the losses."""
    e = tl.arange(0, E_PAD)[None, :]
    k = tl.arange(0, K_PAD)[None, :]
    probs, lse = _softmax(logits, e < E)
    probs = round_to(probs, PROBS_DTYPE)
    top_p, top_e = _select(probs, e < E, K, K_PAD, E_PAD, BLOCK_T)
    if NORMALIZE:
        total = tl.sum(tl.where(k < K, top_p, 0.0), axis=1)
        top_p = round_to(top_p / round_to(total, PROBS_DTYPE)[:, None], PROBS_DTYPE)
    at = t.to(tl.int64)[:, None] * K + k
    mask = in_segment[:, None] & (k < K)
    tl.store(weight_ptr + at, narrow(top_p, weight_ptr.dtype.element_ty), mask=mask)
    tl.store(expert_ptr + at, top_e, mask=mask)
    first = tl.sum(tl.where(k == 0, top_e, 0), axis=1)
    counted = in_segment[:, None] & (e == first[:, None])
    prob_sum = tl.sum(tl.where(in_segment[:, None] & (e < E), probs, 0.0), axis=0)
    first_sum = tl.sum(tl.where(counted, 1.0, 0.0), axis=0)
    return prob_sum, first_sum, tl.sum(tl.where(in_segment, lse * lse, 0.0), axis=0)


@triton.jit
def store_losses(
    prob_sum, first_sum, z_sum, s, segment, balance_ptr, z_ptr, probs_ptr, share_ptr,
    E: tl.constexpr, E_PAD: tl.constexpr,
):  # fmt: skip
    """Finish segment s from its sums: balance = E sum_e mean p_e * share_e, z = mean lse^2, mean p, and the shares."""
    e = tl.arange(0, E_PAD)
    tokens = segment.to(tl.float32)
    share, probs = first_sum / tokens, prob_sum / tokens
    tl.store(share_ptr + s * E + e, share, mask=e < E)
    tl.store(probs_ptr + s * E + e, probs, mask=e < E)
    tl.store(balance_ptr + s, E * tl.sum(probs * share, axis=0))
    tl.store(z_ptr + s, z_sum / tokens)


@triton.jit
def store_sums(prob_sum, first_sum, z_sum, block, sums_ptr, E: tl.constexpr, E_PAD: tl.constexpr):
    """Write a block's sums, 2 E + 1 floats: probabilities, first choices, squared logsumexp."""
    e = tl.arange(0, E_PAD)
    base = sums_ptr + block * (2 * E + 1)
    tl.store(base + e, prob_sum, mask=e < E)
    tl.store(base + E + e, first_sum, mask=e < E)
    tl.store(base + 2 * E, z_sum)


@triton.jit(do_not_specialize=["segment", "blocks"])
def _topk_gating_kernel(
    logits_ptr,  # (T, E), rows contiguous
    weight_ptr, expert_ptr,  # (T, K) probs_dtype, (T, K) int32
    balance_ptr, z_ptr, probs_ptr, share_ptr,  # (S,), (S,), (S, E), (S, E) fp32: written if ONE_PROGRAM
    sums_ptr,  # (S * blocks, 2 E + 1) fp32: written if not ONE_PROGRAM
    segment, blocks,
    E: tl.constexpr, K: tl.constexpr, E_PAD: tl.constexpr, K_PAD: tl.constexpr, BLOCK_T: tl.constexpr,
    NORMALIZE: tl.constexpr, PROBS_DTYPE: tl.constexpr, ONE_PROGRAM: tl.constexpr,
):  # fmt: skip
    """p = softmax(logits); (weight, expert) = top-K of p; sums of p, first choices and logsumexp^2 by segment.

    Grid (S,) if ONE_PROGRAM: a program owns a segment and finishes its losses. Else (S * blocks,): a program owns
    one block of one segment and writes its sums. fp32 throughout; no atomics.
    """
    e = tl.arange(0, E_PAD)
    if ONE_PROGRAM:
        s = tl.program_id(0).to(tl.int64)
        prob_sum = tl.zeros((E_PAD,), dtype=tl.float32)
        first_sum = tl.zeros((E_PAD,), dtype=tl.float32)
        z_sum = tl.zeros((), dtype=tl.float32)
        for block in range(0, blocks):
            i = block * BLOCK_T + tl.arange(0, BLOCK_T)
            t = s * segment + i
            mask = (i < segment)[:, None] & (e < E)[None, :]
            logits = tl.load(logits_ptr + t[:, None] * E + e[None, :], mask=mask, other=0.0).to(tl.float32)
            p, f, z = route_block(
                logits, t, i < segment, weight_ptr, expert_ptr, E, K, E_PAD, K_PAD, BLOCK_T, NORMALIZE, PROBS_DTYPE
            )
            prob_sum += p
            first_sum += f
            z_sum += z
        store_losses(prob_sum, first_sum, z_sum, s, segment, balance_ptr, z_ptr, probs_ptr, share_ptr, E, E_PAD)
    else:
        program = tl.program_id(0).to(tl.int64)
        i = (program % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
        t = (program // blocks) * segment + i
        mask = (i < segment)[:, None] & (e < E)[None, :]
        logits = tl.load(logits_ptr + t[:, None] * E + e[None, :], mask=mask, other=0.0).to(tl.float32)
        p, f, z = route_block(
            logits, t, i < segment, weight_ptr, expert_ptr, E, K, E_PAD, K_PAD, BLOCK_T, NORMALIZE, PROBS_DTYPE
        )
        store_sums(p, f, z, program, sums_ptr, E, E_PAD)


@triton.jit(do_not_specialize=["segment", "blocks"])
def _gating_losses_kernel(
    sums_ptr,  # (S * blocks, 2 E + 1) fp32
    balance_ptr, z_ptr, probs_ptr, share_ptr,  # (S,), (S,), (S, E), (S, E) fp32
    segment, blocks,
    E: tl.constexpr, E_PAD: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Add up the sums of a segment's blocks and finish its losses. Grid (S,); fp32, fixed order."""
    s = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, E_PAD)
    prob_sum = tl.zeros((E_PAD,), dtype=tl.float32)
    first_sum = tl.zeros((E_PAD,), dtype=tl.float32)
    z_sum = tl.zeros((), dtype=tl.float32)
    for start in range(0, blocks, BLOCK_B):
        block = start + tl.arange(0, BLOCK_B)
        base = sums_ptr + (s * blocks + block) * (2 * E + 1)
        mask = (block < blocks)[:, None] & (e < E)[None, :]
        prob_sum += tl.sum(tl.load(base[:, None] + e[None, :], mask=mask, other=0.0), axis=0)
        first_sum += tl.sum(tl.load(base[:, None] + E + e[None, :], mask=mask, other=0.0), axis=0)
        z_sum += tl.sum(tl.load(base + 2 * E, mask=block < blocks, other=0.0), axis=0)
    store_losses(prob_sum, first_sum, z_sum, s, segment, balance_ptr, z_ptr, probs_ptr, share_ptr, E, E_PAD)


@triton.jit(do_not_specialize=["T", "segment"])
def _topk_gating_backward_kernel(
    logits_ptr, expert_ptr, share_ptr,  # (T, E), (T, K) int32, (S, E) fp32
    dweight_ptr, dbalance_ptr, dz_ptr, dprobs_ptr,  # (T, K), (S,), (S,), (S, E): None where nothing flows back
    dlogits_ptr,  # (T, E)
    T, segment,
    E: tl.constexpr, K: tl.constexpr, E_PAD: tl.constexpr, BLOCK_T: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """dl_te = p_te (g_te - sum_e' p_te' g_te') + dz_s 2 lse_t p_te / n, where g = dL/dp of token t and n = segment.

    g has a part of the losses, (dbalance_s E share_se + dprobs_se) / n, and one of the weights of the selected experts:
    with w = p / sum_selected p it is (dw_e - sum_selected dw w) / sum_selected p, without it dw_e.
    Grid (cdiv(T, BLOCK_T),); a program owns whole tokens; fp32 throughout.
    """
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, E_PAD)
    s = t // segment
    mask = (t < T)[:, None] & (e < E)[None, :]
    logits = tl.load(logits_ptr + t[:, None] * E + e[None, :], mask=mask, other=0.0).to(tl.float32)
    probs, lse = _softmax(logits, (e < E)[None, :])
    grad = tl.zeros((BLOCK_T, E_PAD), dtype=tl.float32)
    if dweight_ptr is not None:
        chosen = tl.zeros((BLOCK_T, E_PAD), dtype=tl.int1)
        for k in range(K):
            expert = tl.load(expert_ptr + t * K + k, mask=t < T, other=0)
            dweight = tl.load(dweight_ptr + t * K + k, mask=t < T, other=0.0).to(tl.float32)
            here = e[None, :] == expert[:, None]
            chosen = chosen | here
            grad = tl.where(here, dweight[:, None], grad)
        if NORMALIZE:
            total = tl.sum(tl.where(chosen, probs, 0.0), axis=1)
            mean = tl.sum(tl.where(chosen, probs * grad, 0.0), axis=1) / total
            grad = tl.where(chosen, (grad - mean[:, None]) / total[:, None], 0.0)
    if dbalance_ptr is not None:
        share = tl.load(share_ptr + s[:, None] * E + e[None, :], mask=mask, other=0.0)
        dbalance = tl.load(dbalance_ptr + s, mask=t < T, other=0.0)
        grad += (dbalance * (E / segment))[:, None] * share
    if dprobs_ptr is not None:
        grad += tl.load(dprobs_ptr + s[:, None] * E + e[None, :], mask=mask, other=0.0) / segment
    dlogits = probs * (grad - tl.sum(probs * grad, axis=1)[:, None])
    if dz_ptr is not None:
        dz = tl.load(dz_ptr + s, mask=t < T, other=0.0)
        dlogits += (dz * (2.0 / segment) * lse)[:, None] * probs
    tl.store(dlogits_ptr + t[:, None] * E + e[None, :], narrow(dlogits, dlogits_ptr.dtype.element_ty), mask=mask)


TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def topk_gating_forward(
    logits_TE: Tensor, top_k: int, segment: int, normalize: bool, probs_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the gating; returns the fields of `Routing` and share_SE, for the backward."""
    T, E = logits_TE.shape
    outputs = new_routing(logits_TE, E, top_k, segment, probs_dtype)
    weight_TK, expert_TK, *losses = outputs
    if T == 0:
        return outputs
    S = T // segment
    tile = tiling.gating_tile(segment, E)
    blocks = tiling.cdiv(segment, tile.BLOCK_T)
    sums = logits_TE.new_empty((0 if tile.ONE_PROGRAM else S * blocks, 2 * E + 1), dtype=torch.float32)
    launch(
        _topk_gating_kernel, (S if tile.ONE_PROGRAM else S * blocks,),
        logits_TE.contiguous(), weight_TK, expert_TK, *losses, sums, segment, blocks,
        E=E, K=top_k, E_PAD=tiling.next_power_of_2(E), K_PAD=tiling.next_power_of_2(top_k), BLOCK_T=tile.BLOCK_T,
        NORMALIZE=normalize, PROBS_DTYPE=TL_DTYPES[probs_dtype], ONE_PROGRAM=tile.ONE_PROGRAM,
        num_warps=tile.num_warps,
    )  # fmt: skip
    if not tile.ONE_PROGRAM:
        finish_losses(sums, losses, segment, blocks)
    return outputs


def new_routing(
    like: Tensor, num_experts: int, top_k: int, segment: int, probs_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised fields of `Routing`, and share_SE, for the T tokens of `like`; zeros if T = 0."""
    T, E = like.shape[0], num_experts
    S = T // segment if segment else 1
    new = like.new_empty if T else like.new_zeros
    return (
        new((T, top_k), dtype=probs_dtype),
        new((T, top_k), dtype=torch.int32),
        new((S,), dtype=torch.float32),
        new((S,), dtype=torch.float32),
        new((S, E), dtype=torch.float32),
        new((S, E), dtype=torch.float32),
    )


def finish_losses(sums: Tensor, losses: list[Tensor], segment: int, blocks: int) -> None:
    """Launch `_gating_losses_kernel`, which fills `losses`: balance_S, z_S, mean_probs_SE and share_SE."""
    S, E = losses[-1].shape
    E_PAD = tiling.next_power_of_2(E)
    launch(
        _gating_losses_kernel, (S,), sums, *losses, segment, blocks,
        E=E, E_PAD=E_PAD, BLOCK_B=max(1, 4096 // E_PAD), num_warps=4,
    )  # fmt: skip


def topk_gating_backward(
    logits_TE: Tensor,
    expert_TK: Tensor,
    share_SE: Tensor,
    dweight_TK: Tensor | None,
    dbalance_S: Tensor | None,
    dz_S: Tensor | None,
    dprobs_SE: Tensor | None,
    segment: int,
    normalize: bool,
) -> Tensor:
    """Launch the gradient of the gating; returns dlogits_TE in the dtype of `logits_TE`."""
    T, E = logits_TE.shape
    dlogits_TE = torch.empty_like(logits_TE, memory_format=torch.contiguous_format)
    tile = tiling.gating_tile(T, E)
    launch(
        _topk_gating_backward_kernel, (tiling.cdiv(T, tile.BLOCK_T),),
        logits_TE.contiguous(), expert_TK, share_SE,
        *(grad if grad is None else grad.contiguous() for grad in (dweight_TK, dbalance_S, dz_S, dprobs_SE)),
        dlogits_TE, T, segment,
        E=E, K=expert_TK.shape[1], E_PAD=tiling.next_power_of_2(E), BLOCK_T=tile.BLOCK_T, NORMALIZE=normalize,
        num_warps=tile.num_warps,
    )  # fmt: skip
    return dlogits_TE
