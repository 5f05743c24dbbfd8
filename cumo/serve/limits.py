# SPDX-License-Identifier: Apache-2.0
"""What one client may ask of the server."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Upper limits; a request beyond one of them is answered with a 4xx that names it.

    Raises:
        ValueError: a limit is not positive.
    """

    max_body_bytes: int = 32 * MIB
    """Bytes of a request's body."""
    max_images: int = 8
    """Pictures in all messages of a request."""
    max_image_bytes: int = 16 * MIB
    """Bytes of a picture's file, decoded from base64 or fetched."""
    max_image_pixels: int = 40_000_000
    """Width times height of a picture."""
    max_image_side: int = 8192
    """Pixels of a picture's longer side: it is padded to a square before it is scaled down, so a thin one grows."""
    max_text_bytes: int = MIB
    """Bytes of the text of all messages together, in UTF-8."""
    max_messages: int = 256
    """Messages of a request."""
    max_tokens: int = 2048
    """Tokens of an answer."""
    default_tokens: int = 512
    """Tokens of an answer at most, where the request does not say."""
    max_choices: int = 8
    """Answers to a request (`n`)."""
    max_batch_size: int = 8
    """Answers that are generated together."""
    max_batch_tokens: int = 32768
    """Tokens of a batch: its rows times the longest of them, prompt and answer, and of a request by itself. Bounds the
    memory of keys and values."""
    max_queue: int = 64
    """Requests that wait for the batch that runs now; more are answered with 429."""
    header_seconds: float = 15.0
    """For the headers of a request to arrive; then the connection is closed."""
    upload_seconds: float = 60.0
    """For the body of a request to arrive."""
    fetch_seconds: float = 10.0
    """For a picture of the web to arrive."""

    def __post_init__(self) -> None:
        """Validate."""
        for field in fields(self):
            value = getattr(self, field.name)
            if not (0 if field.name == "max_queue" else 1e-9) <= value < math.inf:
                raise ValueError(f"{field.name}: expected a positive number, got {value}")

    @property
    def slots(self) -> int:
        """Requests that may be in the server at once."""
        return self.max_batch_size + self.max_queue
