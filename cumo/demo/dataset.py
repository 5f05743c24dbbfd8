# SPDX-License-Identifier: Apache-2.0
"""The data of the demo on disk: pictures as PNG, conversations as LLaVA's JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator
from PIL import Image

from cumo.checkpoints.files import written_aside
from cumo.demo import scenes
from cumo.demo.language import SYSTEM
from cumo.demo.settings import Settings
from cumo.models.tokenizer import IMAGE_TOKEN

CAPTIONS, QUESTIONS, TEST = "captions.json", "questions.json", "test.json"
BLANK = "blank.png"  # an empty ground, as a picture unlike any other would be answered with nonsense


class TestQuestion(NamedTuple):
    """A question that no training saw, on a picture of digits that no training saw."""

    id: str
    picture: Path
    kind: str
    text: str
    answer: str


def _row(name: str, picture: str, question: str, answer: str, **more: Any) -> dict[str, Any]:
    """A sample in LLaVA's format, without a system prompt."""
    turns = [
        {"from": "system", "value": SYSTEM},
        {"from": "human", "value": f"{IMAGE_TOKEN}\n{question}"},
        {"from": "gpt", "value": answer},
    ]
    return {"id": name, "image": picture, "conversations": turns, **more}


def _draw(folder: Path, drawings: Sequence[scenes.Array], count: int, rng: Generator, most: int) -> list[Any]:
    """Scenes as PNG files below `folder`; what each shows, by file name."""
    folder.mkdir(parents=True)
    drawn = []
    for index in range(count):
        scene = scenes.random_scene(rng, most)
        Image.fromarray(scenes.draw(scene, drawings, rng)).save(folder / f"{index:05}.png")
        drawn.append((f"{folder.name}/{index:05}.png", scene))
    return drawn


def write(target: Path, digits: scenes.Digits, settings: Settings) -> None:
    """Write pictures, captions and questions for training, and the questions of the test.

    Args:
        target: a folder that does not exist yet.
        digits: of which those for tests make the pictures of the test alone.
        settings: how many.
    """
    rng = np.random.default_rng([settings.seed, 3])
    with written_aside(target) as folder:
        drawn = _draw(folder / "train", digits.train, settings.training_scenes, rng, settings.most_digits)
        captions = [_row(name, name, "What is there?", scenes.caption(scene)) for name, scene in drawn]
        rows = [
            _row(f"{name} {number}", name, asked.text, asked.answer)
            for name, scene in drawn
            for number, asked in enumerate(scenes.questions(scene))
        ]
        _dump(folder / CAPTIONS, captions)
        _dump(folder / QUESTIONS, rows)
        drawn = _draw(folder / "test", digits.test, settings.test_scenes, rng, settings.most_digits)
        rows = []
        for name, scene in drawn:
            for asked in scenes.one_of_each_kind(scene, rng):
                rows.append(_row(f"{name} {asked.kind}", name, asked.text, asked.answer, kind=asked.kind))
        _dump(folder / TEST, rows)
        Image.fromarray(scenes.draw_ground("black", rng)).save(folder / BLANK)


def _dump(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def read_test(folder: Path) -> list[TestQuestion]:
    """The questions of the test, from the folder of `write`."""
    return [
        TestQuestion(
            row["id"],
            folder / row["image"],
            row["kind"],
            row["conversations"][1]["value"].removeprefix(f"{IMAGE_TOKEN}\n"),
            row["conversations"][2]["value"],
        )
        for row in json.loads((folder / TEST).read_text())
    ]
