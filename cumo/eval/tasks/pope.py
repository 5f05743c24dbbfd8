# SPDX-License-Identifier: Apache-2.0
"""POPE: `llava_pope_test.jsonl`, `coco/coco_pope_{random,popular,adversarial}.json`, `val2014/`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cumo.data.yaml_text import shown
from cumo.eval.questions import Question
from cumo.eval.scorers import pope
from cumo.eval.tasks.base import SHORT_TOKENS, Scores, Task, row_of
from cumo.eval.tasks.files import Row, read_rows, same_keys

_PREFIX = "coco_pope_"


class Pope(Task):
    """Objects that are in a picture or not. Labels belong to an image and a question, not to a line."""

    name = "pope"
    title = "POPE"
    folder = "pope"
    max_new_tokens = SHORT_TOKENS

    def questions(self) -> list[Question]:
        """See `Task.questions`."""
        asked = self.llava_questions("llava_pope_test.jsonl", self.path / "val2014")
        files = sorted((self.path / "coco").glob(f"{_PREFIX}*.json"))
        labels = {path.stem.removeprefix(_PREFIX): read_rows(path) for path in files}
        category_of = [row_of(question).text("category") for question in asked]
        sources = {category: question.source for category, question in zip(category_of, asked, strict=True)}
        same_keys(sources, dict(zip(labels, map(str, files), strict=True)), "category")
        result: dict[str, Question] = {}
        for category in labels:
            group = [question for question, other in zip(asked, category_of, strict=True) if other == category]
            if self.published_quirks:
                matched = [row.text("label") for row in labels[category]][: len(group)]
                group = group[: len(matched)]
            else:
                matched = _match(group, labels[category])
            for question, label in zip(group, matched, strict=True):
                result[question.id] = replace(question, reference=(category, label))
        return [result[question.id] for question in asked if question.id in result]

    def score(self, questions: Sequence[Question], answers: Sequence[str]) -> Scores:
        """Mean F1 of the categories; all measures of each in the details."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for question, text in zip(questions, answers, strict=True):
            category, label = question.reference
            groups.setdefault(category, []).append((text, label))
        details = {}
        for category in sorted(groups):
            texts, labels = zip(*groups[category], strict=True)
            counts = pope.count(texts, labels)
            measures = ("f1", "accuracy", "precision", "recall", "yes_ratio")
            details[category] = {name: 100 * getattr(counts, name) for name in measures} | {"questions": counts.total}
        value = sum(measures["f1"] for measures in details.values()) / len(details)
        return Scores(value, "mean F1 of the categories, %", details)


def _match(questions: Sequence[Question], labels: Sequence[Row]) -> list[str]:
    """The label of each question; both files must have the same images and questions."""
    known: dict[tuple[str, str], tuple[str, str]] = {}
    for row in labels:
        key, label = (row.text("image"), row.text("text").strip()), row.text("label")
        if label not in ("yes", "no"):
            raise ValueError(f"{row.source}: label: expected yes or no, got {shown(label)}")
        if known.setdefault(key, (label, row.source))[0] != label:
            raise ValueError(
                f"{row.source}: label: expected that of {known[key][1]}, the same question, got {shown(label)}"
            )
    keys = [
        (Path(row_of(question).text("image")).name, question.prompt.split("\n")[0].strip()) for question in questions
    ]
    asked = {key: question.source for key, question in zip(keys, questions, strict=True)}
    same_keys(asked, {key: source for key, (_, source) in known.items()}, "image and question")
    return [known[key][0] for key in keys]
