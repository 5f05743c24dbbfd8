# SPDX-License-Identifier: Apache-2.0
"""Which tile a program works on: expert by expert, without a tile map and without the host knowing the sizes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expert_rows(offset_ptr, E: tl.constexpr, E_PAD: tl.constexpr, BLOCK_M: tl.constexpr):
    """Row tiles of each expert and, inclusively, of all experts up to it: two vectors [E_PAD]."""
    e = tl.arange(0, E_PAD)
    start = tl.load(offset_ptr + e, mask=e < E, other=0)
    end = tl.load(offset_ptr + e + 1, mask=e < E, other=0)
    tiles = (end - start + BLOCK_M - 1) // BLOCK_M
    return tiles, tl.cumsum(tiles, 0)


@triton.jit
def find_expert(row_tile, tiles, last, E_PAD: tl.constexpr):
    """The expert that owns `row_tile`, and the first row tile of that expert."""
    e = tl.arange(0, E_PAD)
    expert = tl.sum((row_tile >= last).to(tl.int32), axis=0)
    return expert, tl.sum(tl.where(e == expert, last - tiles, 0), axis=0)


@triton.jit
def swizzle(index, m_tiles, n_tiles, GROUP_M: tl.constexpr):
    """(m, n) of the `index`-th tile of an m_tiles x n_tiles grid, walked down panels of GROUP_M rows of tiles, so
    that the weights of a panel are read from the L2 cache after the first row."""
    panel = index // (GROUP_M * n_tiles)
    rest = index % (GROUP_M * n_tiles)
    height = tl.minimum(m_tiles - panel * GROUP_M, GROUP_M)
    return panel * GROUP_M + rest % height, rest // height


@triton.jit
def locate(tile, offset_ptr, tiles, last, n_tiles, E_PAD: tl.constexpr, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr):
    """The `tile`-th tile of the whole problem, experts in order.

    Returns the expert, the first row, the end of the expert's rows, the tile's column of tiles, and the number of
    the row tile counted over all experts.
    """
    expert, first_row_tile = find_expert(tile, tiles * n_tiles, last * n_tiles, E_PAD)
    first_row_tile = first_row_tile // n_tiles
    start = tl.load(offset_ptr + expert)
    end = tl.load(offset_ptr + expert + 1)
    m_tiles = (end - start + BLOCK_M - 1) // BLOCK_M
    m, n = swizzle(tile - first_row_tile * n_tiles, m_tiles, n_tiles, GROUP_M)
    return expert, start + m * BLOCK_M, end, n, first_row_tile + m
