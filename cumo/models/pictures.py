# SPDX-License-Identifier: Apache-2.0
"""Pictures of any kind and any source as RGB, upright, within limits; or an error that says what is wrong with them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
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
        image: a PIL image, a path, an address or base64 string, or a uint8 array or tensor [H, W], [H, W, 3 or 4] or
            [3 or 4, H, W]; where both of the latter fit, channels are last. Sixteen bits, and numbers of 0 to 1 in mode
            F, are scaled to eight bits rather than cut off. Transparency is dropped, as published.

    Raises:
        ValueError: `image` is nothing of that, cannot be decoded, or is a picture of mode F with other numbers.
        OSError: a file that cannot be read.
    """
    if isinstance(image, os.PathLike) or (isinstance(image, str) and os.path.isfile(image)):
        return read_rgb(Path(image), f"picture {str(image)[:200]!r}")
    if isinstance(image, str):
        return _of_text(image)
    if isinstance(image, (np.ndarray, Tensor)):
        return _of_array(image)
    if not isinstance(image, Image.Image):
        raise ValueError(f"images: expected PIL images, paths, addresses or uint8 arrays, got {type(image).__name__}")
    image = _upright(image)
    if image.mode == "F":
        image = _of_floats(np.asarray(image))
    if image.mode in MODES_16_BIT:
        values = np.asarray(image).astype(np.float64)
        # Mode I has 32 bits, but files that are read so have 8 or 16.
        scale = 1.0 if image.mode == "I" and values.max(initial=0) <= 255 else 257.0
        image = Image.fromarray(np.rint(values / scale).clip(0, 255).astype(np.uint8))
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # Pillow warns of the short cut
    return image.convert("RGB")


def _of_text(text: str) -> Image.Image:
    """A picture at an address, or in base64."""
    if text.startswith(("http://", "https://")):
        return load_image(text)
    try:
        return load_image(text)
    except Exception as error:  # of base64 or of Pillow, whichever stumbles first
        raise ValueError(
            f"images: expected the path of a file, an address or a picture in base64, got {text[:60]!r}; a prompt is "
            "given as text="
        ) from error


def _of_array(image: Any) -> Image.Image:
    """A uint8 array or tensor, with channels last or first."""
    if image.dtype not in (np.uint8, torch.uint8):
        raise ValueError(
            "images: expected PIL images, paths, addresses or uint8 arrays, got "
            f"{'array' if isinstance(image, np.ndarray) else 'tensor'} of {image.dtype}"
        )
    array = image.detach().cpu().numpy() if isinstance(image, Tensor) else image
    if array.ndim == 3 and array.shape[-1] not in (3, 4) and array.shape[0] in (3, 4):
        array = np.ascontiguousarray(array.transpose(1, 2, 0))
    if array.size and (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))):
        return Image.fromarray(array).convert("RGB")
    raise ValueError(f"images: expected arrays of shape [H, W], [H, W, 3 or 4] or [3 or 4, H, W], got {[*array.shape]}")


def _of_floats(values: np.ndarray[Any, Any]) -> Image.Image:
    """A grey picture of floats: of 0 to 1, or of 0 to 255 as `convert("F")` of Pillow gives them."""
    least, most = float(values.min(initial=0)), float(values.max(initial=0))  # NaN where there is one
    if least >= 0 and most <= 1:
        values = values * 255
    elif not (least >= 0 and most <= 255):
        raise ValueError(
            f"images: expected numbers of 0 to 1 or 0 to 255 in a picture of mode F, got {least:g} to {most:g}"
        )
    return Image.fromarray(np.rint(values).astype(np.uint8))


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
        ValueError: the file cannot be decoded to its end, or has so many pixels that Pillow takes it for an attack
            (`PIL.Image.MAX_IMAGE_PIXELS`).
        OSError: the file does not exist or cannot be read.
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
        ValueError: the square would have more than `MAX_PIXELS` pixels, or `picture` has none.
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


def pad_to_square(picture: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """Put a picture in the middle of a square of that colour, as transformers does; a square is returned as it is."""
    longest = max(picture.size)
    if picture.width == picture.height:
        return picture
    padded = Image.new(picture.mode, (longest, longest), colour)
    padded.paste(picture, ((longest - picture.width) // 2, (longest - picture.height) // 2))
    return padded


def mean_colour(image_processor: Any) -> tuple[int, ...]:
    """The mean of an image processor as a colour, with which pictures are padded."""
    return tuple(int(255 * mean) for mean in image_processor.image_mean)
