# SPDX-License-Identifier: Apache-2.0
"""How well a trained model answers, and where its routers send what it sees."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from cumo.demo.dataset import TestQuestion
from cumo.inference import CuMoPipeline, GenerationOptions
from cumo_kernels import Routing

BATCH = 100
MAX_NEW_TOKENS = 8


class Answers(NamedTuple):
    """A model's answers to the questions of the test."""

    texts: list[str]
    """Answers in the order of the questions."""
    accuracy: float
    """Share that equals the expected answer letter by letter."""
    by_kind: dict[str, float]


def answer(
    pipeline: CuMoPipeline, questions: Sequence[TestQuestion], title: str, picture: Path | None = None
) -> Answers:
    """Let a model generate answers, greedily.

    Args:
        pipeline: the model.
        questions: of the test.
        title: what the progress is called.
        picture: shown in place of the picture of every question.
    """
    texts: list[str] = []
    options = GenerationOptions(max_new_tokens=MAX_NEW_TOKENS)
    with tqdm(total=len(questions), desc=title, unit="answer", disable=not sys.stderr.isatty()) as bar:
        for begin in range(0, len(questions), BATCH):
            conversations = [
                [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image", "image": picture or question.picture},
                            {"type": "text", "text": question.text},
                        ],
                    }
                ]
                for question in questions[begin : begin + BATCH]
            ]
            texts += [completion.text for completion in pipeline.generate(conversations, options)]
            bar.update(len(conversations))
    right = [text == question.answer for text, question in zip(texts, questions, strict=True)]
    by_kind: dict[str, list[bool]] = {}
    for question, is_right in zip(questions, right, strict=True):
        by_kind.setdefault(question.kind, []).append(is_right)
    answers = Answers(
        texts,
        sum(right) / len(right),
        {kind: sum(values) / len(values) for kind, values in by_kind.items()},
    )
    print(f"{title}: {answers.accuracy:.1%} of {len(right)} answers right", file=sys.stderr, flush=True)
    return answers


def _shares(routing: Routing, experts: int, rows: slice) -> list[float]:
    """Share of all choices of some tokens that went to each expert."""
    counts = torch.bincount(routing.expert_TK[rows].flatten().long(), minlength=experts)
    return (counts / counts.sum()).tolist()


@torch.inference_mode()
def expert_load(pipeline: CuMoPipeline, pictures: Sequence[Path]) -> dict[str, Any] | None:
    """Load of the experts over pictures: {"vision": {layer: {scale: shares}}, "connector": shares}.

    All choices count, those of the class token too, as in the log of a training. None where there are no experts.
    """
    model = pipeline.model
    if not model.config.vision_config.is_moe:
        return None
    with pipeline.exclusive():
        pixels: Tensor = pipeline.processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        vision = model.vision_tower(**pipeline.on_device({"pixel_values": pixels}))
        _, connected = model.connector(vision.features)
    vision_config = model.config.vision_config
    layers: dict[str, dict[str, list[float]]] = {}
    for layer, routing in enumerate(vision.routings):
        per_tile = len(routing.expert_TK) // sum(vision.tiles_per_scale)
        begin = 0
        for scale, tiles in zip(vision_config.scales, vision.tiles_per_scale, strict=True):
            rows = slice(begin * per_tile, (begin + tiles) * per_tile)
            layers.setdefault(str(layer), {})[str(scale)] = _shares(routing, vision_config.num_experts, rows)
            begin += tiles
    load: dict[str, Any] = {"vision": layers}
    if connected is not None:
        load["connector"] = _shares(connected, model.config.connector_num_experts, slice(None))
    return load


def loads_by_layer(load: dict[str, Any]) -> dict[str, list[float]]:
    """Of each layer, all scales together as a picture has them, under a name: "block 0", ..., "connector".

    Scale s has s**2 tiles, and so s**2 times the tokens of scale 1.
    """
    named: dict[str, list[float]] = {}
    for layer, scales in load["vision"].items():
        tiles = {scale: int(scale) ** 2 for scale in scales}
        named[f"block {int(layer) + 1}"] = [
            sum(tiles[scale] * shares[expert] for scale, shares in scales.items()) / sum(tiles.values())
            for expert in range(len(next(iter(scales.values()))))
        ]
    if "connector" in load:
        named["connector"] = load["connector"]
    return named
