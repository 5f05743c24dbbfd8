# SPDX-License-Identifier: Apache-2.0
"""TextVQA: `llava_textvqa_val_v051_ocr.jsonl`, `TextVQA_0.5.1_val.json`, `train_images/`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from cumo.data.yaml_text import shown
from cumo.eval.questions import Question
from cumo.eval.scorers import textvqa
from cumo.eval.scorers.vqa import NUM_ANSWERS
from cumo.eval.tasks.base import SHORT_TOKENS, Scores, Task, row_of
from cumo.eval.tasks.files import read_json

_QUESTIONS = "llava_textvqa_val_v051_ocr.jsonl"
_ANNOTATIONS = "TextVQA_0.5.1_val.json"


class TextVQA(Task):
    """Text in pictures. The prompts hold what an OCR system read in them."""

    name = "textvqa"
    title = "VQA-T"
    folder = "textvqa"
    max_new_tokens = SHORT_TOKENS

    def _annotations(self) -> tuple[dict[tuple[str, str], list[str]], Counter[tuple[str, str]]]:
        """Answers by image and question, the last where a pair occurs again, as published; and how often each does."""
        path = self.path / _ANNOTATIONS
        answers: dict[tuple[str, str], list[str]] = {}
        number: Counter[tuple[str, str]] = Counter()
        data = read_json(path).get("data")
        if not isinstance(data, list):
            raise ValueError(f"{path}: data: expected a list, got {shown(data)}")
        for index, entry in enumerate(data):
            try:
                key, people = (str(entry["image_id"]), str(entry["question"]).lower()), entry["answers"]
            except (KeyError, TypeError) as error:
                raise ValueError(f"{path}: data {index}: expected image_id, question and answers") from error
            texts = isinstance(people, list) and all(isinstance(answer, str) for answer in people)
            if not texts or len(people) != NUM_ANSWERS:
                raise ValueError(f"{path}: data {index}: answers: expected {NUM_ANSWERS}, got {shown(people)}")
            answers[key] = people
            number[key] += 1
        return answers, number

    def questions(self) -> list[Question]:
        """See `Task.questions`."""
        answers, number = self._annotations()
        questions = []
        for question in self.llava_questions(_QUESTIONS, self.path / "train_images", unique_ids=False):
            try:
                key = (str(question.published_id), textvqa.question_of(row_of(question).text("text")))
            except ValueError as error:
                raise ValueError(f"{question.source}: {error}") from error
            if not number[key]:
                raise ValueError(
                    f"{question.source}: expected a question that {_ANNOTATIONS} has once more, got {shown(key)}"
                )
            number[key] -= 1
            questions.append(replace(question, reference=answers[key]))
        left = +number
        if left:
            raise ValueError(f"{self.path / _QUESTIONS}: expected every question of {_ANNOTATIONS}, lacks {min(left)}")
        return questions

    def score(self, questions: Sequence[Question], answers: Sequence[str]) -> Scores:
        """Mean soft accuracy."""
        people = [question.reference for question in questions]
        return Scores(
            textvqa.accuracy(zip(answers, people, strict=True)),
            "soft accuracy, %",
            {"questions": len(questions)},
            note="OCR tokens in the prompt, as published",
        )
