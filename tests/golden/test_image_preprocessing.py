# SPDX-License-Identifier: Apache-2.0
"""Pixel values of the published implementation, which pads to a square, resizes and normalises."""

import re

import numpy as np

from cumo.models.pictures import to_rgb
from cumo.models.processor import clip_image_processor
from tests.golden.data import below, golden, load_tensors

TOLERANCE = 1e-2  # one of 256 grey levels, normalised, is more
MEAN_TOLERANCE = 1e-4


def test_pixel_values():
    tensors, metadata = load_tensors("image_preprocessing.safetensors")
    names = sorted(below(tensors, "pixel_values_"))
    assert names
    step = int(re.search(r"every (\d+)th row", metadata["note"])[1])
    image_size = int(re.search(r"bicubic to (\d+)", metadata["note"])[1])
    processor = clip_image_processor(image_size)
    for name in names:
        picture = to_rgb(golden(f"image_{name}.png"))
        (pixels,) = processor(picture)["pixel_values"]
        expected = tensors[f"pixel_values_{name}"].numpy()
        assert pixels.shape == (3, image_size, image_size)
        assert np.abs(pixels[:, ::step, ::step] - expected).max() <= TOLERANCE, name
        assert np.abs(pixels.mean((1, 2)) - tensors[f"mean_{name}"].numpy()).max() <= MEAN_TOLERANCE, name
