# SPDX-License-Identifier: Apache-2.0
"""Dispatch plan: a stable counting sort of the expert ids, without float work, atomics or a look at the host."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from cumo_kernels import tiling
from cumo_kernels.kernels.launch import launch


@triton.jit
def _load_ids(expert_ptr, i, end, E: tl.constexpr):
    """Expert ids of the flat choices `i`: -1 for ids that are to be ignored, -2 from `end` on."""
    ids = tl.load(expert_ptr + i, mask=i < end, other=-1)
    ids = tl.where((ids >= 0) & (ids < E), ids, -1)
    return tl.where(i < end, ids, -2).to(tl.int32)


@triton.jit
def _hits(ids, E_PAD: tl.constexpr):
    """Which expert each id names, as 0 and 1 [BLOCK, E_PAD]; an ignored id names none."""
    return (ids[:, None] == tl.arange(0, E_PAD)[None, :]).to(tl.int32)


@triton.jit
def _count(expert_ptr, start, end, E: tl.constexpr, E_PAD: tl.constexpr, BLOCK: tl.constexpr):
    """How often each expert occurs in the choices start : end, added up across threads only once."""
    hits = tl.zeros((BLOCK, E_PAD), dtype=tl.int32)
    for i in range(start, end, BLOCK):
        hits += _hits(_load_ids(expert_ptr, i + tl.arange(0, BLOCK), end, E), E_PAD)
    return tl.sum(hits, axis=0)


@triton.jit(do_not_specialize=["N"])
def _count_experts_kernel(
    expert_ptr, counts_ptr,  # (N,) int32, (chunks, E) int32
    N, E: tl.constexpr, E_PAD: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """counts[c, e] = how often expert e occurs in chunk c of CHUNK choices. Grid (cdiv(N, CHUNK),)."""
    chunk = tl.program_id(0)
    count = _count(expert_ptr, chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, N), E, E_PAD, BLOCK)
    e = tl.arange(0, E_PAD)
    tl.store(counts_ptr + chunk * E + e, count, mask=e < E)


@triton.jit(do_not_specialize=["N", "chunks"])
def _plan_dispatch_kernel(
    expert_ptr, counts_ptr,  # (N,) int32, (chunks, E) int32 (read if COUNTED)
    token_ptr, route_ptr, slot_ptr, offset_ptr,  # (N,), (N,), (N,), (E + 1,) int32
    N, chunks,
    K: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    SCAN: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """slot[i] = offset[id_i] + how many earlier choices have the same id; ignored choices stand after all others.

    Grid (cdiv(N, CHUNK),); a program places one chunk of choices. Counts of the whole and of the chunks before
    its own come from `counts_ptr`, SCAN chunks at a time, or, where N is small, from reading all ids again, SCAN at a
    time: one launch less. Integers only, so the sums are exact in any order.
    """
    chunk = tl.program_id(0)
    e = tl.arange(0, E_PAD)
    if COUNTED:
        total = tl.zeros((E_PAD,), dtype=tl.int32)
        before = tl.zeros((E_PAD,), dtype=tl.int32)
        for start in range(0, chunks, SCAN):
            c = start + tl.arange(0, SCAN)
            mask = (c < chunks)[:, None] & (e < E)[None, :]
            counts = tl.load(counts_ptr + c[:, None] * E + e[None, :], mask=mask, other=0)
            total += tl.sum(counts, axis=0)
            before += tl.sum(tl.where((c < chunk)[:, None], counts, 0), axis=0)
    else:
        before = _count(expert_ptr, 0, chunk * CHUNK, E, E_PAD, SCAN)
        total = before + _count(expert_ptr, chunk * CHUNK, N, E, E_PAD, SCAN)
    end = tl.cumsum(total, 0)
    if chunk == 0:
        tl.store(offset_ptr + e + 1, end, mask=e < E)
        tl.store(offset_ptr, 0)
    next_row = end - total + before  # row of the next choice of each expert
    next_ignored = tl.sum(total, axis=0) + chunk * CHUNK - tl.sum(before, axis=0)
    row_in_block = tl.arange(0, BLOCK)
    for start in range(0, CHUNK, BLOCK):
        i = chunk * CHUNK + start + row_in_block
        ids = _load_ids(expert_ptr, i, N, E)
        earlier = (ids[None, :] == ids[:, None]) & (row_in_block[None, :] < row_in_block[:, None])
        rank = tl.sum(earlier.to(tl.int32), axis=1)
        base = tl.sum(tl.where(ids[:, None] == e[None, :], next_row[None, :], 0), axis=1)
        used = ids >= 0
        row = tl.where(used, base, next_ignored) + rank
        tl.store(slot_ptr + i, tl.where(used, row, -1), mask=i < N)
        tl.store(route_ptr + row, i, mask=i < N)
        tl.store(token_ptr + row, tl.where(used, i // K, -1), mask=i < N)
        next_row += tl.sum(_hits(ids, E_PAD), axis=0)
        next_ignored += tl.sum((ids == -1).to(tl.int32), axis=0)


def plan_dispatch(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the counting sort; returns token_N, route_N, slot_TK and offset_E1, all int32."""
    T, K = expert_TK.shape
    N, E = T * K, num_experts
    new = functools.partial(expert_TK.new_empty if N else expert_TK.new_zeros, dtype=torch.int32)
    token_N, route_N, slot_TK, offset_E1 = new(N), new(N), new((T, K)), new(E + 1)
    if N == 0:
        return token_N, route_N, slot_TK, offset_E1
    expert_TK = expert_TK.contiguous()
    tile = tiling.dispatch_tile(N, E)
    chunks = tiling.cdiv(N, tile.CHUNK)
    E_PAD = tiling.next_power_of_2(E)
    counts = new((chunks if tile.COUNTED else 0, E))
    if tile.COUNTED:
        launch(
            _count_experts_kernel, (chunks,), expert_TK, counts, N,
            E=E, E_PAD=E_PAD, BLOCK=tile.BLOCK, CHUNK=tile.CHUNK, num_warps=8,
        )  # fmt: skip
    launch(
        _plan_dispatch_kernel, (chunks,), expert_TK, counts, token_N, route_N, slot_TK, offset_E1, N, chunks,
        K=K, E=E, E_PAD=E_PAD, BLOCK=tile.BLOCK, CHUNK=tile.CHUNK, SCAN=tile.SCAN, COUNTED=tile.COUNTED, num_warps=8,
    )  # fmt: skip
    return token_N, route_N, slot_TK, offset_E1
