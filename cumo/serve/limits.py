# SPDX-License-Identifier: Apache-2.0
"""What one client may ask of the server."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Upper limits of requests. A request beyond one is refused with a 4xx status that names the limit.

    Raises:
        ValueError: a limit is not positive.
    """

    max_body_bytes: int = 32 * MIB
    """Size of a request's body in bytes."""
    max_images: int = 8
    """Number of pictures in all messages of a request."""
    max_image_bytes: int = 16 * MIB
    """Size of a picture's file in bytes, decoded from base64 or fetched."""
    max_image_pixels: int = 40_000_000
    """Number of a picture's pixels, width times height."""
    max_image_side: int = 8192
    """Longer side of a picture in pixels. It is padded to a square before it is scaled down, so a thin one grows."""
    max_text_bytes: int = MIB
    """Size of the text of all messages together, in bytes of UTF-8."""
    max_messages: int = 256
    """Number of messages in a request."""
    max_tokens: int = 2048
    """Largest number of answer tokens that a request may ask for."""
    default_tokens: int = 512
    """Largest number of answer tokens where the request does not say."""
    max_choices: int = 8
    """Number of answers to a request (`n`)."""
    max_batch_size: int = 8
    """Number of answers that are generated together."""
    max_batch_tokens: int = 32768
    """Number of tokens in a batch: rows times the length of the longest, prompt and answer. One request by itself must
    also stay below it. Bounds the memory of keys and values."""
    max_queue: int = 64
    """Number of requests that wait for the running batch; further ones are answered with 429."""
    header_seconds: float = 15.0
    """Seconds for the headers of a request to arrive; then the connection is closed."""
    upload_seconds: float = 60.0
    """Seconds for the body of a request to arrive."""
    fetch_seconds: float = 10.0
    """Seconds for a picture from the web to arrive."""

    def __post_init__(self) -> None:
        """Validate."""
        for field in fields(self):
            value = getattr(self, field.name)
            if not (0 if field.name == "max_queue" else 1e-9) <= value < math.inf:
                raise ValueError(f"{field.name}: expected a positive number, got {value}")

    @property
    def slots(self) -> int:
        """Number of requests that may be in the server at once."""
        return self.max_batch_size + self.max_queue
