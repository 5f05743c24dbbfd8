# SPDX-License-Identifier: Apache-2.0
"""Pictures of any kind and any source as RGB, upright, within limits; or an error that says what is wrong with them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image
from transformers.image_utils import load_image

MODES_16_BIT = ("I", "I;16", "I;16B", "I;16L", "I;16N")
# Pixels of a picture that was padded to a square or enlarged to the side of a square: a picture of 1 x 65535 pixels is
# no bomb to Pillow, and becomes one here.
MAX_PIXELS = 500_000_000

_METADATA = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # where Pillow finds an orientation
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb(image: Any) -> Image.Image:
    """A picture of any kind, upright and with three channels of eight bits.

    Args:
        image: a PIL image, a path, an address or base64 string, or a uint8 array [H, W] or [H, W, 3 or 4]. Sixteen bits
            are scaled to eight rather than cut off. Transparency is dropped, as published.

    Raises:
        ValueError: it is nothing of that, or a file that cannot be decoded.
        OSError: a file that cannot be read.
    """
    if isinstance(image, os.PathLike) or (isinstance(image, str) and os.path.isfile(image)):
        return read_rgb(Path(image), f"picture {str(image)[:200]!r}")
    if isinstance(image, str):
        return load_image(image)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        if image.size and (image.ndim == 2 or (image.ndim == 3 and image.shape[-1] in (3, 4))):
            return Image.fromarray(image).convert("RGB")
        raise ValueError(f"images: expected arrays of shape [H, W] or [H, W, 3 or 4], got {[*image.shape]}")
    if not isinstance(image, Image.Image):
        kind = f"array of {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"images: expected PIL images, paths, addresses or uint8 arrays, got {kind}")
    image = _upright(image)
    if image.mode in MODES_16_BIT:
        values = np.asarray(image).astype(np.float64)
        # Mode I has 32 bits, but files that are read so have 8 or 16.
        scale = 1.0 if image.mode == "I" and values.max(initial=0) <= 255 else 257.0
        image = Image.fromarray(np.rint(values / scale).clip(0, 255).astype(np.uint8))
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # Pillow warns of the short cut
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its metadata say; damaged ones say nothing, and the picture need not be damaged."""
    image.load()
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # whatever their bytes led the parser to
        return image
    if turn is None:
        return image
    turned = image.transpose(turn)
    for key in _METADATA:  # they would have it turned again
        turned.info.pop(key, None)
    return turned


def read_rgb(source: Path | BinaryIO, name: str) -> Image.Image:
    """A picture of a file of any bytes, as `to_rgb` gives it.

    Args:
        source: the file.
        name: what errors call it.

    Raises:
        ValueError: it cannot be decoded to its end, or has so many pixels that Pillow takes it for an attack
            (`PIL.Image.MAX_IMAGE_PIXELS`).
        OSError: there is no such file, or it cannot be read.
    """
    if isinstance(source, Path):
        if "\0" in str(source):
            raise ValueError(f"{name}: expected a path, got one with a NUL character")
        with source.open("rb") as file:
            return read_rgb(file, name)
    try:
        with Image.open(source) as image:
            most = Image.MAX_IMAGE_PIXELS
            if most is not None and image.width * image.height > most:
                raise ValueError(f"expected up to {most} pixels, got {image.width} x {image.height}")
            return to_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever a broken file makes them stumble over
        raise ValueError(f"{name}: cannot be decoded: {type(error).__name__}: {error}") from error


def check_extent(picture: Image.Image, size: int, pad: bool) -> None:
    """Raise for a picture that is so long and thin that it would not fit into memory on its way to a square.

    Args:
        picture: any.
        size: side of the square.
        pad: the picture is padded to a square before it is scaled down; otherwise its shorter side is scaled to `size`.

    Raises:
        ValueError: it is.
    """
    longest, shortest = max(picture.size), min(picture.size)
    if shortest < 1:
        raise ValueError(f"images: expected pictures with pixels, got {picture.width} x {picture.height}")
    pixels = longest**2 if pad else size * (size * longest // shortest)
    if pixels > MAX_PIXELS:
        raise ValueError(
            f"images: expected pictures that are not so long and thin, got {picture.width} x {picture.height}, of "
            f"which {'padding' if pad else 'scaling'} makes {pixels} pixels"
        )
