# SPDX-License-Identifier: Apache-2.0
"""The geometry of several image scales (S2, arXiv 2403.13043), as pure functions: split into tiles, merge, pool.

An image at scale s is cut into s x s tiles of the size that the encoder knows. Tiles are numbered row by row and lie
tile-major in the batch: tile 0 of all images, then tile 1 of all images, and so on.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def resize(pixels: Tensor, size: int) -> Tensor:
    """[B, C, H, W] -> [B, C, size, size], bicubic in float32, without antialiasing, as published."""
    if pixels.shape[-2:] == (size, size):
        return pixels
    return F.interpolate(pixels.float(), size=(size, size), mode="bicubic", align_corners=False).to(pixels.dtype)


def split_tiles(images: Tensor, scale: int) -> Tensor:
    """[B, C, s H, s W] -> [s * s * B, C, H, W], in the dtype of the images.

    Args:
        images: at scale s.
        scale: s.

    Raises:
        ValueError: height or width is not a multiple of `scale`.

    Examples:
        >>> import torch
        >>> images = torch.arange(16).view(1, 1, 4, 4)
        >>> tiles = split_tiles(images, scale=2)
        >>> tiles.shape, tiles[1].tolist()  # the second tile is the upper right one
        (torch.Size([4, 1, 2, 2]), [[[2, 3], [6, 7]]])
        >>> torch.equal(merge_tiles(tiles, scale=2), images)
        True
    """
    B, C, height, width = images.shape
    if height % scale or width % scale:
        raise ValueError(f"images: expected height and width to be multiples of {scale}, got {[*images.shape]}")
    H, W = height // scale, width // scale
    return images.view(B, C, scale, H, scale, W).permute(2, 4, 0, 1, 3, 5).reshape(scale * scale * B, C, H, W)


def merge_tiles(tiles: Tensor, scale: int) -> Tensor:
    """[s * s * B, C, H, W] -> [B, C, s H, s W]: the inverse of `split_tiles`.

    Raises:
        ValueError: the number of tiles is not a multiple of scale**2.
    """
    N, C, H, W = tiles.shape
    if N % scale**2:
        raise ValueError(f"tiles: expected a multiple of {scale**2} tiles, got {N}")
    B = N // scale**2
    return tiles.view(scale, scale, B, C, H, W).permute(2, 3, 0, 4, 1, 5).reshape(B, C, scale * H, scale * W)


def pool(features: Tensor, size: int) -> Tensor:
    """[B, C, s H, s W] -> [B, C, size, size]: the mean of the features that fall on each output place."""
    return F.interpolate(features, size=(size, size), mode="area")


def pool_tiles(tokens: Tensor, scale: int) -> Tensor:
    """Patch features of tiles [s * s * B, H * H, D] -> [B, H * H, D]: merged into one map, pooled to that of a tile.

    Args:
        tokens: in the order of `split_tiles`, patches row by row.
        scale: s.

    Raises:
        ValueError: the patches do not form a square.

    Examples:
        >>> import torch
        >>> pool_tiles(torch.randn(9 * 2, 576, 8), scale=3).shape  # two images of nine tiles
        torch.Size([2, 576, 8])
    """
    N, patches, D = tokens.shape
    side = int(patches**0.5)
    if side * side != patches:
        raise ValueError(f"tokens: expected a square number of patches, got {patches}")
    maps = tokens.transpose(1, 2).reshape(N, D, side, side)
    return pool(merge_tiles(maps, scale), side).flatten(2).transpose(1, 2)
