# SPDX-License-Identifier: Apache-2.0
"""Samples, files of them, and a processor, all made up."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from cumo.data import DataSource
from cumo.models.processor import CuMoProcessor, clip_image_processor
from cumo.models.tokenizer import IMAGE_TOKEN


def byte_tokenizer(bos: str | None = "<s>", eos: str = "</s>", control: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Each byte is a token, so that lengths can be counted by hand; there may be no BOS, and further control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<unk>", *filter(None, (bos, eos))]
    vocabulary = {piece: index for index, piece in enumerate([*special, *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if bos is not None:
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 1)])
    names = {"bos_token": bos, "eos_token": eos, "unk_token": "<unk>", "pad_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **{k: v for k, v in names.items() if v})
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN, *control]})
    return tokenizer


def byte_processor(image_size: int = 12, image_seq_length: int = 4, **options: Any) -> CuMoProcessor:
    """A processor around `byte_tokenizer`."""
    return CuMoProcessor(clip_image_processor(image_size), byte_tokenizer(), image_seq_length, **options)


def llava(question: str = "q", answer: str = "yes", images: Any = None, **fields: Any) -> dict[str, Any]:
    """A row of one question; `images` are put before it."""
    count = len(images) if isinstance(images, list) else int(images is not None)
    turns = [{"from": "human", "value": IMAGE_TOKEN * count + question}, {"from": "gpt", "value": answer}]
    return {**fields, **({} if images is None else {"image": images}), "conversations": turns}


class Files:
    """A folder of data files and pictures."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def json(self, rows: Any, name: str = "data.json", **layout: Any) -> DataSource:
        """A list; a row begins every few lines."""
        path = self.folder / name
        path.write_text(json.dumps(rows, **{"indent": 1, **layout}), encoding="utf-8")
        return DataSource(str(path))

    def jsonl(self, rows: list[Any], name: str = "data.jsonl") -> DataSource:
        """A row on each line; what is no object is written as it is."""
        path = self.folder / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines), encoding="utf-8")
        return DataSource(str(path))

    def picture(self, name: str = "a.png", width: int = 20, height: int = 10, seed: int = 0) -> str:
        """A picture of noise."""
        values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(values).save(self.folder / name)
        return name
