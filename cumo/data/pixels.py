# SPDX-License-Identifier: Apache-2.0
"""CLIP's preprocessing of training pictures by table, bit for bit equal to the image processor's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaImageProcessorPil

from cumo.models.pictures import check_extent, mean_colour, pad_to_square

_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")


class PixelReader:
    """Converts pictures to the pixels of an image processor.

    Scaling and normalising map each of 256 values of a channel to one number. These are looked up in a table that the
    image processor itself has made. The steps before are done by Pillow, without copying pictures back and forth.

    Args:
        image_processor: an image processor that `supports` accepts.
        pad: whether to pad pictures to squares with the mean colour; otherwise their centre is cropped.
        size: height and width of the result; by default those of the image processor.
    """

    def __init__(self, image_processor: Any, pad: bool, size: int | None = None) -> None:
        self.pad = pad
        self.size = int(image_processor.crop_size["height"]) if size is None else size
        self.resample = image_processor.resample
        self.background = mean_colour(image_processor)
        gradient = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2))
        made = image_processor([gradient], do_resize=False, do_center_crop=False, do_pad=False)["pixel_values"][0]
        self.table = np.ascontiguousarray(np.asarray(made, dtype=np.float32)[:, 0])

    @staticmethod
    def supports(image_processor: Any) -> bool:
        """Whether an image processor does what this class does: pad, resize, crop to a square, scale, normalise RGB."""
        if type(image_processor) is not LlavaImageProcessorPil:
            return False
        size, crop = image_processor.size, image_processor.crop_size
        square = size.get("shortest_edge") == crop.get("height") == crop.get("width") is not None
        steps = all(getattr(image_processor, step) for step in _STEPS)
        mean = image_processor.image_mean
        return square and steps and isinstance(mean, (list, tuple)) and len(mean) == 3

    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Convert RGB pictures to float32 [pictures, 3, size, size]."""
        pixels = np.empty((len(pictures), 3, self.size, self.size), dtype=np.float32)
        for picture, out in zip(pictures, pixels, strict=True):
            values = np.asarray(self._square(picture))
            for channel in range(3):
                np.take(self.table[channel], values[:, :, channel], out=out[channel], mode="clip")
        return torch.from_numpy(pixels)

    def _square(self, picture: Image.Image) -> Image.Image:
        check_extent(picture, self.size, self.pad)
        width, height = picture.size
        longest, shortest = max(width, height), min(width, height)
        if self.pad and width != height:
            picture, shortest = pad_to_square(picture, self.background), longest
        long_side = int(self.size * max(picture.size) / shortest)
        new = (long_side, self.size) if picture.width > picture.height else (self.size, long_side)
        left, top = (new[0] - self.size) // 2, (new[1] - self.size) // 2
        resized = picture.resize(new, self.resample)
        return resized.crop((left, top, left + self.size, top + self.size))
