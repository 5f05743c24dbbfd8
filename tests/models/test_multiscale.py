# SPDX-License-Identifier: Apache-2.0
"""Tiles, maps and pooling: pure geometry."""

import pytest
import torch

from cumo.models.multiscale import merge_tiles, pool_tiles, resize, split_tiles


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_merging_undoes_splitting(scale):
    images = torch.randn(2, 3, 4 * scale, 5 * scale)
    tiles = split_tiles(images, scale)
    assert tiles.shape == (scale * scale * 2, 3, 4, 5)
    assert torch.equal(merge_tiles(tiles, scale), images)


def test_tiles_go_row_by_row_and_images_lie_within_a_tile():
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
    image = (10 * rows + columns).float().expand(1, 1, 6, 6)
    tiles = split_tiles(torch.cat([image, image + 100]), 3)
    corners = tiles[:, 0, 0, 0].tolist()
    assert corners == [v + i for v in (0, 2, 4, 20, 22, 24, 40, 42, 44) for i in (0, 100)]


def test_pooling_takes_the_mean_of_the_features_under_each_patch():
    tokens = torch.randn(4, 9, 5)  # one image at scale 2, tiles of 3 x 3 patches
    maps = merge_tiles(tokens.transpose(1, 2).reshape(4, 5, 3, 3), 2)
    expected = maps.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(-1, -2)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(pool_tiles(tokens, 2), expected)


def test_resizing_to_the_same_size_changes_nothing():
    pixels = torch.randn(2, 3, 7, 7)
    assert resize(pixels, 7) is pixels
    assert resize(pixels.bfloat16(), 14).dtype == torch.bfloat16


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="images: expected height and width to be multiples of 3, got"):
        split_tiles(torch.zeros(1, 3, 6, 7), 3)
    with pytest.raises(ValueError, match="tiles: expected a multiple of 4 tiles, got 5"):
        merge_tiles(torch.zeros(5, 3, 2, 2), 2)
    with pytest.raises(ValueError, match="tokens: expected a square number of patches, got 8"):
        pool_tiles(torch.zeros(4, 8, 2), 2)
