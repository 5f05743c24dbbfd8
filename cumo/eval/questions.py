# SPDX-License-Identifier: Apache-2.0
"""Questions with pictures, and the interface of a model that answers them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from cumo.models.pictures import read_rgb


@dataclass(frozen=True)
class Picture:
    """A picture of a question, in a file or in memory; decoded when it is needed.

    Args:
        name: as the benchmark names it.
        source: path, or the bytes of an encoded picture.
    """

    name: str
    source: Path | bytes

    def open(self) -> Image.Image:
        """Decode it, in RGB.

        Raises:
            ValueError: it cannot be decoded.
        """
        where = self.source if isinstance(self.source, Path) else self.name
        try:
            return read_rgb(io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source, "it")
        except (ValueError, OSError) as error:
            raise ValueError(f"{where}: expected a picture, got {error}") from error

    def fingerprint(self) -> str:
        """Name and size, of bytes the hash too."""
        if isinstance(self.source, bytes):
            return f"{self.name} {hashlib.sha256(self.source).hexdigest()}"
        return f"{self.name} {self.source.stat().st_size}"


@dataclass(frozen=True)
class Question:
    """One question of a benchmark.

    Args:
        id: unique within the benchmark.
        content: text and pictures in the order that the model sees them.
        published_id: what the benchmark's own files call it; several questions on one picture may share it.
        reference: what the task scores the answer by.
        source: file and row, for errors.
    """

    id: str
    content: tuple[str | Picture, ...]
    published_id: str | int
    reference: Any = None
    source: str = ""

    @property
    def prompt(self) -> str:
        """Its text without pictures."""
        return "\n".join(part for part in self.content if isinstance(part, str))

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """Its pictures in their order."""
        return tuple(part for part in self.content if isinstance(part, Picture))


class Model(Protocol):
    """Something that answers questions."""

    @property
    def name(self) -> str:
        """Name of the model in results."""

    @property
    def fingerprint(self) -> str:
        """Changes with its weights: answers of one fingerprint are never mixed with those of another."""

    def answer(self, questions: Sequence[Question], max_new_tokens: int) -> list[str]:
        """Answers of one batch of questions, in their order, without blanks around them."""


def fingerprint(questions: Sequence[Question]) -> str:
    """Hash of what a model sees of the questions: ids, texts and pictures, in their order."""
    digest = hashlib.sha256()
    for question in questions:
        parts = (part.fingerprint() if isinstance(part, Picture) else part for part in question.content)
        digest.update("\0".join((question.id, *parts)).encode() + b"\0\0")
    return digest.hexdigest()
