# SPDX-License-Identifier: Apache-2.0
"""Pixels are those of the image processor, bit for bit."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from cumo.data import ConversationDataset
from cumo.data.pixels import PixelReader
from cumo.models.processor import clip_image_processor
from tests.data.samples import byte_processor, llava

SIZES = [(336, 336), (640, 480), (480, 640), (97, 41), (41, 97), (1, 30), (500, 499), (20, 1000)]


def noise(width, height):
    values = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("pad", [True, False], ids=["pad", "square"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_same_bits(size, pad):
    processor = clip_image_processor(56)
    expected = torch.tensor(np.stack(processor([noise(*size)], do_pad=pad)["pixel_values"]))
    assert PixelReader.supports(processor)
    assert torch.equal(PixelReader(processor, pad)([noise(*size)]), expected)


def test_other_means_and_several_pictures():
    processor = clip_image_processor(28, image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.2, 0.1], rescale_factor=1 / 127)
    pictures = [noise(*size) for size in SIZES]
    expected = torch.tensor(np.stack(processor(pictures, do_pad=True)["pixel_values"]))
    assert torch.equal(PixelReader(processor, True)(pictures), expected)


def test_what_does_something_else_is_left_to_itself(files):
    assert not PixelReader.supports(CLIPImageProcessorPil())
    assert not PixelReader.supports(clip_image_processor(28, do_normalize=False))
    assert not PixelReader.supports(clip_image_processor(28, image_mean=0.5))
    processor = byte_processor()
    processor.image_processor.do_normalize = False
    dataset = ConversationDataset([files.json([llava(images=files.picture())])], processor, "plain", progress=False)
    assert dataset.readers == {} and dataset[0]["pixel_values"].max() > 0.9


@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_a_data_set_gives_the_processors_pixels(files, aspect):
    processor = byte_processor(high_resolution_size=24)
    dataset = ConversationDataset(
        [files.json([llava(images=files.picture())])], processor, "plain", image_aspect=aspect, progress=False
    )
    picture = Image.open(files.folder / "a.png").convert("RGB")
    expected = processor([picture], images_kwargs={"do_pad": aspect == "pad"}, return_tensors="pt")
    example = dataset[0]
    assert torch.equal(example["pixel_values"], expected["pixel_values"])
    assert torch.equal(example["pixel_values_large"], expected["pixel_values_large"][0])
