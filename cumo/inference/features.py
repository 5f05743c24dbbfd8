# SPDX-License-Identifier: Apache-2.0
"""Embeddings of pictures, kept so that a picture is encoded once in a conversation of many turns."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor


class PreparedPicture(NamedTuple):
    """A picture that has yet to be encoded, or its embeddings."""

    key: bytes
    embeddings: Tensor | None
    """[patches, LLM width]; None if they were not in the cache."""
    pixels: dict[str, Any]
    """The encoder's input; empty if there are embeddings."""


def picture_key(picture: Image.Image) -> bytes:
    """Hash of a picture's pixels, mode and size."""
    digest = hashlib.sha256(f"{picture.mode} {picture.size}".encode())
    digest.update(picture.tobytes())
    return digest.digest()


class FeatureCache:
    """Tensors by key, the least recently used ones dropped at a limit of bytes. Safe to use from several threads.

    Args:
        max_bytes: limit of all tensors together; 0 keeps nothing.

    Raises:
        ValueError: the limit is negative.
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
        """The tensor of a key, None if it is not there."""
        with self._lock:
            found = self._entries.get(key)
            if found is None:
                self.misses += 1
            else:
                self.hits += 1
                self._entries.move_to_end(key)
            return found

    def peek(self, key: bytes) -> Tensor | None:
        """The tensor of a key, without counting as a use of it."""
        with self._lock:
            return self._entries.get(key)

    def put(self, key: bytes, tensor: Tensor) -> None:
        """Keep a tensor, unless it is larger than the limit by itself."""
        size = tensor.nbytes
        with self._lock:
            if key in self._entries or size > self.max_bytes:
                return
            self._entries[key] = tensor
            self.bytes += size
            while self.bytes > self.max_bytes:
                self.bytes -= self._entries.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Forget every tensor."""
        with self._lock:
            self._entries.clear()
            self.bytes = 0
