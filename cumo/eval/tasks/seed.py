# SPDX-License-Identifier: Apache-2.0
"""SEED-Bench: `SEED-Bench.json`, `llava-seed-bench-new.jsonl` or `llava-seed-bench.jsonl`, and pictures beside them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cumo.eval.questions import Question
from cumo.eval.scorers import seed
from cumo.eval.tasks.base import SHORT_TOKENS, Scores, Task, percent, percent_by
from cumo.eval.tasks.files import Row, read_entries, read_json, same_keys, unique

_QUESTIONS = ("llava-seed-bench-new.jsonl", "llava-seed-bench.jsonl")
_IMAGE = "image"


class Seed(Task):
    """Multiple choice on pictures and on frames of videos. The videos may be left out of the questions."""

    name = "seed"
    title = "SEED-I"
    folder = "seed_bench"
    max_new_tokens = SHORT_TOKENS

    def _references(self) -> dict[str, tuple[Row, str]]:
        """(row, name of its type) of every question of the benchmark."""
        path = self.path / "SEED-Bench.json"
        content: dict[str, Any] = read_json(path)
        entries = content.get("questions")
        types = {number: name for name, number in content.get("question_type", {}).items()}
        if not isinstance(entries, list) or not types:
            raise ValueError(f"{path}: expected questions and question_type, got {sorted(content)}")
        rows = read_entries(path, {f"questions {index}": entry for index, entry in enumerate(entries)}).values()
        unique(((str(row.get("question_id", str, int)), row.source) for row in rows), "question_id")
        for row in rows:
            if row.get("question_type_id", int) not in types:
                raise ValueError(f"{row.source}: question_type_id: expected one of {sorted(types)}, got another")
        return {str(row.get("question_id", str, int)): (row, types[row.get("question_type_id", int)]) for row in rows}

    def questions(self) -> list[Question]:
        """See `Task.questions`."""
        known = self._references()
        name = next((name for name in _QUESTIONS if (self.path / name).is_file()), _QUESTIONS[0])
        asked = self.llava_questions(name, self.path)
        sources = {question.id: question.source for question in asked}
        complete = any(known[key][0].get("data_type", str) != _IMAGE for key in sources if key in known)
        wanted = {key: row.source for key, (row, _) in known.items() if complete or row.get("data_type", str) == _IMAGE}
        same_keys(sources, wanted, "question_id")
        result = []
        for question in asked:
            row, kind = known[question.id]
            reference = (row.text("answer"), row.get("data_type", str), kind)
            result.append(replace(question, reference=reference))
        return result

    def score(self, questions: Sequence[Question], answers: Sequence[str]) -> Scores:
        """Accuracy over pictures; over everything, by kind of data and by type of question in the details."""
        rows, upload = [], ""
        for question, text in zip(questions, answers, strict=True):
            answer, data_type, kind = question.reference
            rows.append((data_type, kind, seed.is_correct(text, answer)))
            upload += json.dumps({"question_id": question.published_id, "prediction": text}) + "\n"
        by_data = percent_by([(data_type, right) for data_type, _, right in rows])
        details = {
            "total": percent([right for _, _, right in rows]),
            "data_type": by_data,
            "question_type": percent_by([(kind, right) for _, kind, right in rows]),
            "questions": len(rows),
        }
        return Scores(by_data.get(_IMAGE), "accuracy over pictures, %", details, {"upload.jsonl": upload})
