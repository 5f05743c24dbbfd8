# SPDX-License-Identifier: Apache-2.0
"""Maps of experts: against the routers themselves, patch by patch, and where each patch lies in the picture."""

import numpy as np
import pytest
import torch
from PIL import Image

from cumo.inference import GenerationOptions, picture_routing
from cumo.models.multiscale import resize, split_tiles
from tests.inference.tiny import ask, dense_pipeline, picture


def test_maps_are_what_the_routers_said(pipeline):
    routing = picture_routing(pipeline, picture())
    config = pipeline.model.config.vision_config
    assert [maps.scale for maps in routing.vision] == config.scales == [1, 3]
    tower = pipeline.model.vision_tower
    pixels = pipeline.pixels(picture())["pixel_values"]
    for maps in routing.vision:
        side = 4 * maps.scale
        assert maps.experts.shape == maps.weights.shape == (config.num_used_layers, 2, side, side)
        tiles = split_tiles(resize(pixels, 28 * maps.scale), maps.scale)
        for row in range(maps.scale):
            for column in range(maps.scale):
                # the tile by itself, through the encoder alone
                with torch.no_grad():
                    _, alone = tower.encode(tiles[row * maps.scale + column][None])
                for layer in range(config.num_used_layers):
                    expected = alone[layer].expert_TK[1:].reshape(4, 4, 2)
                    actual = maps.experts[layer, :, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
                    assert torch.equal(actual.permute(1, 2, 0), expected)
    torch.testing.assert_close(routing.vision[1].weights.sum(dim=1), torch.ones(2, 12, 12))
    for maps in (*routing.vision, routing.connector):
        torch.testing.assert_close(maps.load.sum(dim=1), torch.ones(len(maps.experts)))
        share = (maps.experts[0] == 2).float().mean()
        torch.testing.assert_close(maps.load[0, 2], share)
    assert routing.connector.experts.shape == (1, 2, 4, 4)


def test_the_connector_by_patch(pipeline):
    maps = picture_routing(pipeline, picture()).connector
    with torch.no_grad():
        features = pipeline.model.vision_tower(**pipeline.pixels(picture())).features
        _, routing = pipeline.model.connector(features)
    for patch in (0, 3, 5, 15):
        assert maps.experts[0, :, patch // 4, patch % 4].tolist() == routing.expert_TK[patch].tolist()
        torch.testing.assert_close(maps.weights[0, :, patch // 4, patch % 4], routing.weight_TK[patch])


@pytest.mark.parametrize("pad", [True, False], ids=["padded", "cropped"])
def test_the_picture_is_the_square_that_the_encoder_sees(pipeline, monkeypatch, pad):
    """Scaled down to the encoder's size, it is the encoder's input, but for how it was scaled."""
    processor = pipeline.processor.image_processor
    monkeypatch.setattr(processor, "do_pad", pad)
    wide = Image.new("RGB", (40, 20), (200, 30, 40))
    wide.paste((10, 220, 90), (0, 0, 12, 20))
    shown = picture_routing(pipeline, wide).picture
    assert shown.size == (672, 672)
    actual = np.asarray(shown.resize((28, 28))) / 255
    mean, std = np.array(processor.image_mean), np.array(processor.image_std)
    seen = pipeline.pixels(wide)["pixel_values"][0].numpy().transpose(1, 2, 0) * std + mean
    far = np.abs(actual - seen).max(axis=-1) > 0.05
    assert far.mean() < 0.15  # but at edges
    assert seen[0, 14] == pytest.approx(mean if pad else np.array([200, 30, 40]) / 255, abs=0.03)


def test_embeddings_are_kept_for_the_question(pipeline):
    pipeline.features.clear()
    expected = pipeline.picture_embeddings(pipeline.prepare_picture(picture(7)))
    pipeline.features.clear()
    picture_routing(pipeline, picture(7))
    assert len(pipeline.features) == 1
    hits = pipeline.features.hits
    assert torch.equal(pipeline.picture_embeddings(pipeline.prepare_picture(picture(7))), expected)
    pipeline.generate([ask("What?", picture(7))], GenerationOptions(max_new_tokens=1))
    assert pipeline.features.hits == hits + 2


@pytest.mark.parametrize("high_resolution", [False, True])
def test_dense_and_high_resolution_models(pipeline, high_resolution):
    routing = picture_routing(dense_pipeline(pipeline, high_resolution=high_resolution), picture())
    assert routing.vision == ()
    assert routing.connector is None
    assert routing.picture.size == (672, 672)
