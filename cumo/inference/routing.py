# SPDX-License-Identifier: Apache-2.0
"""Maps over a picture of the experts that its patches were sent to.

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

SIDE = 672  # pixels of a side of the picture that is shown


class ExpertMaps(NamedTuple):
    """Experts of the patches of one scale, or of the connector (L is 1)."""

    scale: int
    num_experts: int
    experts: Tensor
    """Experts of each patch [L, K, H, W] int32, the most probable first."""
    weights: Tensor
    """Weights of these experts [L, K, H, W] float32, which sum to 1 over K."""

    @property
    def load(self) -> Tensor:
        """Share of all choices that went to each expert, [L, E] float32."""
        layers = [torch.bincount(layer.flatten(), minlength=self.num_experts) for layer in self.experts]
        counts = torch.stack(layers).float()
        return counts / counts.sum(dim=1, keepdim=True)


class PictureRouting(NamedTuple):
    """Experts of a picture's patches, in the encoder at each scale and in the connector."""

    picture: Image.Image
    """Picture that the maps lie over: padded or cut to the encoder's square, in a larger size for display."""
    vision: tuple[ExpertMaps, ...]
    """Maps of each scale; empty where the encoder's blocks are dense."""
    connector: ExpertMaps | None
    """Maps of the connector; None where it is dense."""


@torch.inference_mode()
def picture_routing(pipeline: CuMoPipeline, picture: Image.Image) -> PictureRouting:
    """Encode an RGB picture and record its routing. Its embeddings are cached for the question that follows."""
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
    """Return experts and weights [K, scale * side, scale * side] of one block at one scale."""

    def merged(choice_TK: Tensor) -> Tensor:
        tokens = choice_TK.unflatten(0, (tiles, -1))[begin : begin + scale**2]
        patches = tokens[:, tokens.shape[1] - side**2 :]  # without the class token, if there is one
        return merge_tiles(patches.transpose(1, 2).unflatten(2, (side, side)).contiguous(), scale)[0]

    return merged(routing.expert_TK), merged(routing.weight_TK)


def _square(pipeline: CuMoPipeline, picture: Image.Image) -> Image.Image:
    """Fit the picture into a square as the image processor does, at the size for display."""
    processor: Any = pipeline.processor.image_processor
    size = (max(SIDE, pipeline.model.config.vision_config.encoder_config.image_size),) * 2
    if processor.do_pad:
        return pad_to_square(picture, mean_colour(processor)).resize(size, processor.resample)
    return ImageOps.fit(picture, size) if processor.do_center_crop else picture.resize(size)
