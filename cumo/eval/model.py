# SPDX-License-Identifier: Apache-2.0
"""CuMo as the model of an evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from cumo.eval.questions import Picture, Question
from cumo.inference import CuMoPipeline, GenerationOptions

_SAMPLE = 1 << 20  # bytes that are read at the start, the middle and the end of a large file
_FINGERPRINTED = (".json", ".safetensors", ".bin", ".model", ".jinja", ".txt")
_DECODERS = 8  # threads: decoding a picture leaves Python's lock


def folder_fingerprint(folder: Path, **options: object) -> str:
    """Hash of a checkpoint: names, sizes and samples of its files, and options that change answers.

    Weights are sampled, not read: a checkpoint that training overwrote differs in every tensor.
    """
    digest = hashlib.sha256(repr(sorted(options.items())).encode())
    for path in sorted(folder.iterdir()):
        if path.suffix not in _FINGERPRINTED or not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"\0{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for start in sorted({0, max(0, size // 2 - _SAMPLE // 2), max(0, size - _SAMPLE)}):
                file.seek(start)
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def conversation(question: Question, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """A question as a conversation of one turn.

    Args:
        question: asked.
        images: its pictures, decoded.
    """
    left = iter(images)
    content: list[dict[str, Any]] = [
        {"type": "image", "image": next(left)} if isinstance(part, Picture) else {"type": "text", "text": part}
        for part in question.content
    ]
    return [{"role": "user", "content": content}]


class PipelineModel:
    """A checkpoint behind `CuMoPipeline`, which is loaded once it is asked something.

    Args:
        name: folder of a checkpoint, or a model of the hub.
        load: makes the pipeline; by default `CuMoPipeline.from_pretrained(name, **options)`.
        options: of loading, such as `dtype` and `device`.
    """

    def __init__(self, name: str, load: Callable[[], CuMoPipeline] | None = None, **options: Any) -> None:
        self.name = name
        self._options = options
        self._load = load or (lambda: CuMoPipeline.from_pretrained(name, **options))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the checkpoint's files and the data type; for a model of the hub, of its name and revision."""
        options = {key: str(value) for key, value in self._options.items() if key != "device"}
        if Path(self.name).is_dir():
            return folder_fingerprint(Path(self.name), **options)
        return hashlib.sha256(repr((self.name, sorted(options.items()))).encode()).hexdigest()

    @cached_property
    def pipeline(self) -> CuMoPipeline:
        """The loaded model."""
        return self._load()

    def answer(self, questions: Sequence[Question], max_new_tokens: int) -> list[str]:
        """Greedy answers, as published."""
        pictures = [picture for question in questions for picture in question.pictures]
        with ThreadPoolExecutor(_DECODERS) as pool:
            images = iter(list(pool.map(Picture.open, pictures)))
        conversations = [conversation(question, [next(images) for _ in question.pictures]) for question in questions]
        options = GenerationOptions(max_new_tokens=max_new_tokens, temperature=0.0)
        return [completion.text for completion in self.pipeline.generate(conversations, options)]
