# SPDX-License-Identifier: Apache-2.0
"""Tile choices are pure functions, so they are tested without running a kernel."""

import dataclasses
import itertools

import pytest
import torch

from cumo_kernels import tiling
from cumo_kernels.tiling import GEMM_KINDS, Target

TARGETS = {"sm_80": Target.cuda(80, 108), "sm_90": Target.cuda(90, 132), "sm_100": Target.cuda(100, 148)}
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (1, 8, 16, 64, 65, 512, 4096, 46160, 10**6)
EXPERTS = (1, 4, 8, 60, 128, 256)
WIDTHS = (1, 17, 64, 200, 256, 1024, 14336)


def every_gemm(targets):
    """Parametrise target, dtype and kind."""
    return pytest.mark.parametrize(
        ("target", "dtype", "kind"),
        [
            pytest.param(target, dtype, kind, id=f"{name}-{str(dtype).removeprefix('torch.')}-{kind}")
            for (name, target), dtype, kind in itertools.product(targets.items(), DTYPES, GEMM_KINDS)
        ],
    )


def is_power_of_2(n):
    return n > 0 and n & (n - 1) == 0


def gemm_tiles(target, dtype, kind):
    """Every distinct tile over the sizes above."""
    sizes = itertools.product(ROWS, EXPERTS, WIDTHS)
    return {tiling.gemm_tile(target, dtype, rows, experts, n, kind, 1024) for rows, experts, n in sizes}


@every_gemm({"interpreter": tiling.INTERPRETER, **TARGETS})
def test_gemm_tiles_are_legal(target, dtype, kind):
    for tile in gemm_tiles(target, dtype, kind):
        sides = (tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K)
        assert all(is_power_of_2(side) and side >= 16 for side in sides), tile  # the least side of a matrix product
        assert is_power_of_2(tile.num_warps), tile
        assert tile.num_stages >= 1, tile
        assert tile.GROUP_M >= 1, tile
        assert tile.SLICES in (1, 2, 4, 8), tile
        assert tile.BLOCK_N // tile.SLICES >= 16, tile
        assert tile.meta().keys() == {"BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M", "num_warps", "num_stages"}
        assert not tile.SWAP or kind in ("forward", "gated"), tile  # the others have no such path


@every_gemm(TARGETS)
def test_gemm_tiles_fit_in_shared_memory(target, dtype, kind):
    for tile in gemm_tiles(target, dtype, kind):
        operands = tile.BLOCK_M + tile.BLOCK_N * (2 if kind == "gated" else 1)  # gated: two tiles of weights
        buffers = operands * tile.BLOCK_K * dtype.itemsize * tile.num_stages
        assert buffers * tile.programs_per_sm <= SHARED_MEMORY[target.arch], tile


@every_gemm(TARGETS)
def test_accumulators_fit_in_registers(target, dtype, kind):
    for tile in gemm_tiles(target, dtype, kind):
        accumulators = tile.BLOCK_M * tile.BLOCK_N * (2 if kind == "gated" else 1)
        assert accumulators / (tile.num_warps * 32) <= 160, tile  # of 255; the rest is for operands


@pytest.mark.parametrize("kind", GEMM_KINDS)
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("experts", [4, 8, 128])
def test_a_tile_changes_at_a_few_token_counts_only(experts, target, kind):
    """Else a new batch size would compile kernels anew."""
    tiles = [tiling.gemm_tile(target, torch.bfloat16, rows, experts, 1024, kind, 1024) for rows in range(1, 20_000)]
    changes = [rows for rows, (a, b) in enumerate(itertools.pairwise(tiles), start=1) if a != b]
    assert len(changes) <= 2
    assert tiles[9_998] == tiles[9_999]


def test_tiles_of_all_kernels_are_the_same_for_5000_and_5001_tokens():
    for experts in (4, 60):
        assert tiling.dispatch_tile(2 * 5000, experts) == tiling.dispatch_tile(2 * 5001, experts)
        assert tiling.gating_tile(5000, experts) == tiling.gating_tile(5001, experts)
        assert tiling.grad_row_tile(2 * 5000) == tiling.grad_row_tile(2 * 5001)


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"kind: expected one of .*, got 'backward'"):
        tiling.gemm_tile(tiling.INTERPRETER, torch.float32, 1, 1, 1, "backward", 1)


@pytest.mark.parametrize("experts", [1, 2, 3, 4, 60, 64, 200, 256])
@pytest.mark.parametrize("choices", [1, 2, 255, 1154, 5000, 46160, 10**6])
def test_dispatch_tiles_are_legal(choices, experts):
    tile = tiling.dispatch_tile(choices, experts)
    assert all(is_power_of_2(side) for side in (tile.CHUNK, tile.BLOCK, tile.SCAN)), tile
    assert tile.CHUNK % tile.BLOCK == 0, tile
    e_pad = tiling.next_power_of_2(experts)
    assert tile.SCAN * e_pad <= 2**15, tile  # comparisons of a step, held in registers
    if not tile.COUNTED:
        assert choices * experts <= 2**18, "every program would read too many ids"


@pytest.mark.parametrize("experts", [1, 2, 3, 4, 60, 64, 256])
@pytest.mark.parametrize("segment", [0, 1, 7, 577, 5000, 10**6])
def test_gating_tiles_are_legal(segment, experts):
    tile = tiling.gating_tile(segment, experts)
    assert is_power_of_2(tile.BLOCK_T), tile
    assert is_power_of_2(tile.num_warps), tile
    assert tile.BLOCK_T * tiling.next_power_of_2(experts) <= 4096, tile
    assert not (tile.ONE_PROGRAM and segment * experts > 65536), tile


@pytest.mark.parametrize("experts", [1, 2, 3, 4, 60, 64])
@pytest.mark.parametrize("target", [tiling.INTERPRETER, *TARGETS.values()], ids=["interpreter", *TARGETS])
def test_linear_gating_tiles_are_legal(target, experts):
    tile = tiling.linear_gating_tile(target, experts)
    for side in (tile.BLOCK_T, tile.BLOCK_D):
        assert is_power_of_2(side), tile
        assert side >= 16, tile
    assert is_power_of_2(tile.num_warps), tile
    assert tile.meta() == dataclasses.asdict(tile)
    operands = (tile.BLOCK_T + max(16, tiling.next_power_of_2(experts))) * tile.BLOCK_D
    buffers = tile.num_stages if target.arch >= 90 else tile.num_stages - 1  # before sm_90 one stage is in registers
    assert operands * torch.float32.itemsize * buffers <= SHARED_MEMORY.get(target.arch, 2**20), tile


@pytest.mark.parametrize("width", [1, 2, 17, 512, 513, 14336])
def test_row_tiles_are_legal(width):
    tile = tiling.row_tile(width)
    assert is_power_of_2(tile.BLOCK_N), tile
    assert is_power_of_2(tile.BLOCK_D), tile
    assert tile.BLOCK_N * tile.BLOCK_D <= 4096, tile
    assert tile.meta() == dataclasses.asdict(tile)


@pytest.mark.parametrize("rows", [0, 1, 8191, 8192, 10**6])
def test_grad_row_tiles_are_legal(rows):
    tile = tiling.grad_row_tile(rows)
    assert is_power_of_2(tile.BLOCK_N), tile
    assert is_power_of_2(tile.BLOCK_D), tile
    assert tile.meta() == dataclasses.asdict(tile)


def test_only_cards_with_a_tensor_memory_accelerator_copy_tokens():
    assert not tiling.use_sorted_copy(TARGETS["sm_80"], 10**6)
    assert tiling.use_sorted_copy(TARGETS["sm_90"], 10**6)
    assert not tiling.use_sorted_copy(TARGETS["sm_90"], 16)


@pytest.mark.parametrize(("n", "expected"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_next_power_of_2(n, expected):
    assert tiling.next_power_of_2(n) == expected
