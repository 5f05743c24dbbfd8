# SPDX-License-Identifier: Apache-2.0
"""GQA: `llava_gqa_testdev_balanced.jsonl`, `data/testdev_balanced_questions.json`, `data/images/`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cumo.eval.questions import Question
from cumo.eval.scorers import gqa
from cumo.eval.tasks.base import SHORT_TOKENS, Scores, Task, percent
from cumo.eval.tasks.files import read_entries, read_json, same_keys


class Gqa(Task):
    """Questions on scenes, one or two words an answer."""

    name = "gqa"
    title = "GQA"
    folder = "gqa"
    max_new_tokens = SHORT_TOKENS

    def questions(self) -> list[Question]:
        """See `Task.questions`."""
        asked = self.llava_questions("llava_gqa_testdev_balanced.jsonl", self.path / "data" / "images")
        path = self.path / "data" / "testdev_balanced_questions.json"
        known = read_entries(path, read_json(path))
        same_keys(
            {question.id: question.source for question in asked},
            {key: row.source for key, row in known.items()},
            "question_id",
        )
        return [replace(question, reference=known[question.id].text("answer")) for question in asked]

    def score(self, questions: Sequence[Question], answers: Sequence[str]) -> Scores:
        """Accuracy; the file that the official script reads among the exports."""
        pairs = list(zip(questions, answers, strict=True))
        predictions = [{"questionId": question.id, "prediction": gqa.normalize(text)} for question, text in pairs]
        return Scores(
            percent([gqa.is_correct(text, question.reference) for question, text in pairs]),
            "accuracy, %",
            {"questions": len(pairs)},
            {"testdev_balanced_predictions.json": predictions},
        )
