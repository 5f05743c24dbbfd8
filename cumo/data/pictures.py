# SPDX-License-Identifier: Apache-2.0
"""Read the pictures of data sets from files."""

from __future__ import annotations

import base64
import binascii
import io
import os
from pathlib import Path

from PIL import Image

from cumo.models.pictures import read_rgb


def open_picture(reference: str, folder: Path) -> Image.Image:
    """Return a decoded picture in RGB.

    Args:
        reference: a path, relative to `folder` or absolute, or `data:image/...;base64,...`. A path may lead out of
            `folder`, as data sets are trusted to name pictures. Nothing is fetched from the network.
        folder: folder of the pictures.

    Raises:
        ValueError: the file does not exist, is damaged, or has so many pixels that Pillow takes it for an attack
            (`PIL.Image.MAX_IMAGE_PIXELS`).
    """
    name = f"picture {reference[:200]!r}"
    source: Path | io.BytesIO
    if reference.startswith("data:"):
        name = "picture in base64"
        header, _, content = reference.partition(",")
        try:
            if not header.endswith(";base64"):
                raise ValueError("no base64")
            source = io.BytesIO(base64.b64decode(content, validate=True))
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"{name}: expected data:image/...;base64, and base64, got {error}") from error
    elif reference.startswith(("http://", "https://")):
        raise ValueError(f"{name}: expected a file, got an address: download pictures before training")
    else:
        source = folder / reference
        name = f"picture {str(source)!r}"
        if not os.path.isfile(source):
            raise ValueError(f"{name[:300]}: expected a file, found none")
    try:
        return read_rgb(source, name)
    except OSError as error:
        raise ValueError(f"{name}: cannot be read: {error.strerror}") from error
