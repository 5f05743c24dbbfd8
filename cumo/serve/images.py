# SPDX-License-Identifier: Apache-2.0
"""Decode clients' pictures within limits, whatever their headers claim."""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Callable

from PIL import Image, UnidentifiedImageError

from cumo.inference.fetch import FetchError, fetch
from cumo.models.pictures import to_rgb
from cumo.serve.errors import ApiError
from cumo.serve.limits import Limits

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
# JPEG files of phones hold further pictures (MPO), which are no animation.
ANIMATIONS = ("PNG", "WEBP", "GIF")
_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[^;,]*)*;base64,", re.ASCII)
_SPACE = re.compile(r"\s+")


class ImageReader:
    """Reads pictures from data URLs, and from the web where that is allowed.

    Args:
        limits: upper limits of a picture.
        allow_urls: whether http and https addresses are fetched.
        fetch: function that returns the content of an address; takes `max_bytes` and `timeout`.
    """

    def __init__(self, limits: Limits, allow_urls: bool = False, fetch: Callable[..., bytes] = fetch) -> None:
        self.limits = limits
        self.allow_urls = allow_urls
        self._fetch = fetch

    def read(self, url: str, name: str) -> Image.Image:
        """Read a picture, upright and in RGB.

        Args:
            url: data URL, or http or https address.
            name: name of the picture in error messages.

        Raises:
            ApiError: `url` holds no picture within the limits.
        """
        if url[:5].lower() == "data:":
            return self._decode(self._from_data_url(url, name), name)
        if url[:7].lower() != "http://" and url[:8].lower() != "https://":
            raise ApiError(400, f"{name}: expected a data URL (data:image/png;base64,...), got {url[:40]!r}")
        if not self.allow_urls:
            raise ApiError(
                400, f"{name}: this server fetches no addresses; expected a data URL (data:image/png;base64,...)"
            )
        try:
            content = self._fetch(url, max_bytes=self.limits.max_image_bytes, timeout=self.limits.fetch_seconds)
        except FetchError as error:
            raise ApiError(400, f"{name}: {error}") from error
        return self._decode(content, name)

    def _from_data_url(self, url: str, name: str) -> bytes:
        head = _DATA_URL.match(url[:200])
        if head is None or not (head[1] or "").startswith("image/"):
            raise ApiError(400, f"{name}: expected data:image/...;base64,..., got {url[:40]!r}")
        text = _SPACE.sub("", url[head.end() :])
        if len(text) * 3 // 4 > self.limits.max_image_bytes + 2:
            raise ApiError(413, f"{name}: expected up to {self.limits.max_image_bytes} bytes, got {len(text) * 3 // 4}")
        try:
            return base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ApiError(400, f"{name}: the base64 is damaged or cut off: {error}") from error

    def _decode(self, content: bytes, name: str) -> Image.Image:
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                self._check(image, name)
                return to_rgb(image)
        except ApiError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ApiError(413, f"{name}: expected up to {self.limits.max_image_pixels} pixels, got more") from error
        except UnidentifiedImageError as error:
            raise ApiError(400, f"{name}: expected a picture in one of the formats {', '.join(FORMATS)}") from error
        except Exception as error:  # decoders raise all kinds of errors on damaged files
            raise ApiError(400, f"{name}: the picture is damaged or cut off: {error}") from error

    def _check(self, image: Image.Image, name: str) -> None:
        """Check format and size from the header, before anything is decoded."""
        width, height = image.size
        limits = self.limits
        if width * height > limits.max_image_pixels:
            raise ApiError(413, f"{name}: expected up to {limits.max_image_pixels} pixels, got {width} x {height}")
        if max(width, height) > limits.max_image_side:
            raise ApiError(413, f"{name}: expected sides up to {limits.max_image_side} pixels, got {width} x {height}")
        if image.format in ANIMATIONS and getattr(image, "n_frames", 1) > 1:
            raise ApiError(400, f"{name}: expected a still picture, got an animation of {image.n_frames} frames")  # type: ignore[attr-defined]
