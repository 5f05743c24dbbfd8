# SPDX-License-Identifier: Apache-2.0
"""Picture files of any bytes: three channels of eight bits, or an error that names the file, whoever opens them."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from random import Random

import numpy as np
import torch
from hypothesis import given
from PIL import Image

from cumo.data.pictures import open_picture
from cumo.data.pixels import PixelReader
from cumo.eval.questions import Picture
from cumo.inference import chat
from cumo.models.pictures import to_rgb
from cumo.models.processor import clip_image_processor
from cumo.serve.errors import ApiError
from cumo.serve.images import ImageReader
from cumo.serve.limits import Limits
from tests.data.samples import byte_processor
from tests.fuzz.mutate import RANDOM, cases, damaged
from tests.serve.serving import data_url

MODES = (
    *("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "I;16B", "F"),
    *("La", "RGBa"),
)
VIA = {"La": "LA", "RGBa": "RGBA", "PA": "P", "LA": "RGBA", "RGBA": "RGBA"}
FORMATS = (
    *("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "ICO", "PCX", "SGI", "JPEG2000", "DDS", "IM", "MSP"),
    *("XBM", "AVIF", "ICNS", "MPO", "DIB", "SPIDER", "BLP"),
)
SIZES = ((24, 18), (1, 1), (1, 300), (300, 1), (7, 64), (64, 64))
PROCESSOR = byte_processor()
READERS = [PixelReader(clip_image_processor(12), pad) for pad in (True, False)]
SERVER = ImageReader(Limits(max_image_pixels=200_000, max_image_side=500))


def made(random: Random) -> Image.Image:
    """A picture of noise in some mode and size."""
    width, height = random.choice(SIZES)
    values = np.random.default_rng(random.randrange(3)).integers(0, 256, (height, width, 4), dtype=np.uint8)
    image, mode = Image.fromarray(values), random.choice(MODES)
    raw = values[:, :, : {"LAB": 3, "I;16": 2, "I;16B": 2}.get(mode, 4)].tobytes()
    if mode in ("LAB", "I;16", "I;16B"):
        return Image.frombytes(mode, image.size, raw)
    image = image.convert(VIA.get(mode, "RGB")).convert(mode)
    if mode == "P":
        image.info["transparency"] = random.choice([0, bytes(range(256))])
    return image


def encoded(random: Random) -> bytes:
    """The file of a picture, of another one where the format cannot hold it."""
    image, file, file_format = made(random), io.BytesIO(), random.choice(FORMATS)
    options = {}
    if random.randrange(4) == 0:
        exif = Image.Exif()
        exif[0x0112] = random.choice([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 65535])
        options["exif"] = damaged(exif.tobytes(), random) if random.randrange(2) else exif.tobytes()
    if random.randrange(6) == 0:
        options["icc_profile"] = bytes(random.randrange(256) for _ in range(40))
    if random.randrange(6) == 0:
        options |= {"save_all": True, "append_images": [image.copy(), image.copy()]}
    if file_format == "AVIF":
        options.clear()  # its encoder, which is not what is tested here, crashes on some metadata
    try:
        image.save(file, file_format, **options)
    except Exception:  # not every format holds every mode
        file = io.BytesIO()
        Image.new("RGB", image.size, "red").save(file, "PNG")
    return file.getvalue()


def check_picture(random: Random) -> None:
    """All who open a picture give the same one, or say that they cannot, and why."""
    raw = encoded(random)
    if random.randrange(4):
        raw = damaged(raw, random)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / random.choice(["a.png", "a b.jpg", "ü.tif", "noend"])
        path.write_bytes(raw)
        opened = []
        for way in (
            lambda: open_picture(path.name, path.parent),
            lambda: to_rgb(path),
            lambda: chat.open_picture(f"'{path}'"),
            lambda: Picture("a", path).open(),
        ):
            try:
                opened.append(way())
            except (ValueError, OSError) as error:
                assert path.name in str(error), repr(error)
                assert len(str(error)) < 1000
                opened.append(None)
        assert len({None if image is None else image.tobytes() for image in opened}) == 1
        if opened[0] is not None:
            assert opened[0].mode == "RGB"
            assert to_rgb(opened[0]).tobytes() == opened[0].tobytes()
            check_pixels(opened[0])
    check_server(raw, opened[0])


def check_pixels(image: Image.Image) -> None:
    """What the encoder is given is finite; what would not fit into memory is refused."""
    try:
        for reader in READERS:
            assert torch.isfinite(reader([image])).all()
        assert np.isfinite(np.asarray(PROCESSOR(images=[image])["pixel_values"])).all()
    except ValueError as error:
        assert "long and thin" in str(error) and max(image.size) > 1000 * min(image.size)


def check_server(raw: bytes, known: Image.Image | None) -> None:
    """The server's reader takes fewer formats, and never another picture."""
    try:
        image = SERVER.read(data_url(raw), "image")
    except ApiError as error:
        assert 400 <= error.status < 500 and error.message.startswith("image: ") and len(error.message) < 1000
        return
    assert known is not None and image.tobytes() == known.tobytes()


@cases()
@given(RANDOM)
def test_pictures(random):
    check_picture(random)
