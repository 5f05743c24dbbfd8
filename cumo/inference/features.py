# SPDX-License-Identifier: Apache-2.0
"""Cache of picture embeddings, so that a picture is encoded once in a conversation of many turns."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor


class PreparedPicture(NamedTuple):
    """A picture's embeddings, or its pixels if it has yet to be encoded."""

    key: bytes
    embeddings: Tensor | None
    """Embeddings [patches, LLM width]; None if they were not in the cache."""
    pixels: dict[str, Any]
    """The encoder's input; empty if there are embeddings."""


def picture_key(picture: Image.Image) -> bytes:
    """Return a hash of a picture's pixels, mode and size."""
    digest = hashlib.sha256(f"{picture.mode} {picture.size}".encode())
    digest.update(picture.tobytes())
    return digest.digest()


class FeatureCache:
    """Tensors by key. Beyond a limit of bytes, the least recently used ones are dropped. Thread-safe.

    Args:
        max_bytes: limit on the total size of the tensors; 0 keeps nothing.

    Raises:
        ValueError: `max_bytes` is negative.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes: expected 0 or more, got {max_bytes}")
        self.max_bytes = max_bytes
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self._entries: OrderedDict[bytes, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> Tensor | None:
        """Return the tensor of a key, or None."""
        with self._lock:
            found = self._entries.get(key)
            if found is None:
                self.misses += 1
            else:
                self.hits += 1
                self._entries.move_to_end(key)
            return found

    def peek(self, key: bytes) -> Tensor | None:
        """Return the tensor of a key, or None, without counting it as a use."""
        with self._lock:
            return self._entries.get(key)

    def put(self, key: bytes, tensor: Tensor) -> None:
        """Keep a tensor, unless it alone exceeds the limit."""
        size = tensor.nbytes
        with self._lock:
            if key in self._entries or size > self.max_bytes:
                return
            self._entries[key] = tensor
            self.bytes += size
            while self.bytes > self.max_bytes:
                self.bytes -= self._entries.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Drop every tensor."""
        with self._lock:
            self._entries.clear()
            self.bytes = 0
