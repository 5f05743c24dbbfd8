# SPDX-License-Identifier: Apache-2.0
"""Which experts the patches of a picture went to, as maps over the picture.

Letters: L blocks of the encoder, K choices of a patch, H height and W width in patches.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor

from cumo.inference.features import picture_key
from cumo.inference.pipeline import CuMoPipeline
from cumo.models.multiscale import merge_tiles
from cumo.models.pictures import mean_colour, pad_to_square
from cumo_kernels import Routing

SIDE = 672  # of the picture that is shown


class ExpertMaps(NamedTuple):
    """Of the patches of one scale, or of the connector (L is 1)."""

    scale: int
    num_experts: int
    experts: Tensor
    """[L, K, H, W] int32: the experts of each patch, the most probable first."""
    weights: Tensor
    """[L, K, H, W] float32: their weights, which sum to 1 over K."""

    @property
    def load(self) -> Tensor:
        """[L, E] float32: share of all choices that went to each expert."""
        layers = [torch.bincount(layer.flatten(), minlength=self.num_experts) for layer in self.experts]
        counts = torch.stack(layers).float()
        return counts / counts.sum(dim=1, keepdim=True)


class PictureRouting(NamedTuple):
    """Of a picture, in the encoder at each scale and in the connector."""

    picture: Image.Image
    """Padded or cut to the square that the encoder sees, over which the maps lie; larger than that, to be looked at."""
    vision: tuple[ExpertMaps, ...]
    """One for each scale; empty where the encoder's blocks are dense."""
    connector: ExpertMaps | None
    """None where the connector is dense."""


@torch.inference_mode()
def picture_routing(pipeline: CuMoPipeline, picture: Image.Image) -> PictureRouting:
    """Encode an RGB picture and see where its patches go. Its embeddings are kept for the question that follows."""
    model = pipeline.model
    vision_config = model.config.vision_config
    pixels = pipeline.pixels(picture)
    with pipeline.exclusive():
        pixels = pipeline.on_device(pixels)
        vision = model.vision_tower(**pixels)
        embeddings, connected = model.connector(vision.features)
        pipeline.features.put(picture_key(picture), embeddings[0])
    side = vision_config.encoder_config.image_size // vision_config.encoder_config.patch_size
    used = (vision.routings or ())[: vision_config.num_used_layers]
    maps, begin = [], 0
    for scale, tiles in zip(vision_config.scales, vision.tiles_per_scale, strict=True):
        if used:
            choices = [_tile_maps(routing, sum(vision.tiles_per_scale), begin, scale, side) for routing in used]
            experts, weights = (torch.stack(kind) for kind in zip(*choices, strict=True))
            maps.append(ExpertMaps(scale, vision_config.num_experts, experts.int().cpu(), weights.float().cpu()))
        begin += tiles
    connector = None
    if connected is not None:
        experts, weights = (
            choice.T.reshape(1, -1, side, side).cpu() for choice in (connected.expert_TK, connected.weight_TK)
        )
        connector = ExpertMaps(1, model.config.connector_num_experts, experts.int(), weights.float())
    return PictureRouting(_square(pipeline, picture), tuple(maps), connector)


def _tile_maps(routing: Routing, tiles: int, begin: int, scale: int, side: int) -> tuple[Tensor, Tensor]:
    """Experts and weights [K, scale * side, scale * side] of one block at one scale."""

    def merged(choice_TK: Tensor) -> Tensor:
        tokens = choice_TK.unflatten(0, (tiles, -1))[begin : begin + scale**2]
        patches = tokens[:, tokens.shape[1] - side**2 :]  # without the class token, where there is one
        return merge_tiles(patches.transpose(1, 2).unflatten(2, (side, side)).contiguous(), scale)[0]

    return merged(routing.expert_TK), merged(routing.weight_TK)


def _square(pipeline: CuMoPipeline, picture: Image.Image) -> Image.Image:
    """The picture as the image processor fits it into a square, in the resolution of a page rather than the encoder."""
    processor: Any = pipeline.processor.image_processor
    size = (max(SIDE, pipeline.model.config.vision_config.encoder_config.image_size),) * 2
    if processor.do_pad:
        return pad_to_square(picture, mean_colour(processor)).resize(size, processor.resample)
    return ImageOps.fit(picture, size) if processor.do_center_crop else picture.resize(size)
