# SPDX-License-Identifier: Apache-2.0
"""The answers of a model to a benchmark, in a folder that grows batch by batch.

`header.json` says whose answers to what they are; every process appends to a file of its own. A run that was killed
goes on where it stopped, also with another number of processes; answers of another model or to other questions are
never taken up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cumo.data.yaml_text import shown
from cumo.eval.distributed import Worker
from cumo.eval.questions import Question
from cumo.eval.records import append_records, read_records

_FORMAT = 1


class AnswerFolder:
    """Answers to the questions of one benchmark.

    Args:
        path: the folder.
        questions: of the benchmark.
    """

    def __init__(self, path: Path, questions: Sequence[Question]) -> None:
        self.path = path
        self.questions = questions

    def claim(self, header: Mapping[str, Any], worker: Worker) -> None:
        """Begin, or go on with, the answers that `header` describes. All processes call this together.

        Args:
            header: what decides about answers: model, task, questions, options. Names that end in `_name` may change.
            worker: of this process.

        Raises:
            ValueError: the folder holds the answers of another header.
        """
        path = self.path / "header.json"
        wanted = json.loads(json.dumps({"format": _FORMAT, **header}))
        if worker.rank == 0 and not path.exists():
            if self._files():
                raise ValueError(f"{self.path}: expected {path.name} beside the answers, found none")
            self.path.mkdir(parents=True, exist_ok=True)
            aside = path.with_suffix(".incomplete")
            aside.write_text(json.dumps(wanted, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            aside.rename(path)
        worker.barrier()
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: expected JSON, got {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{path}: expected an object, got {shown(found)}")
        for key in sorted({*wanted, *found}):
            if not key.endswith("_name") and found.get(key) != wanted.get(key):
                raise ValueError(
                    f"{path}: {key}: expected {wanted.get(key)!r}, got {shown(found.get(key))}: "
                    "these answers belong to another run; choose another output folder, or remove this one"
                )

    def _files(self) -> list[Path]:
        return sorted(self.path.glob("answers.*-of-*.jsonl"))

    def given(self) -> dict[str, str]:
        """Answers by question so far.

        Raises:
            ValueError: a line has no known question, no answer, or another prompt, or a question occurs twice.
        """
        known = {question.id: question for question in self.questions}
        answers: dict[str, str] = {}
        sources: dict[str, str] = {}
        for path in self._files():
            for source, record in read_records(path):
                key, text = record.get("id"), record.get("text")
                if not isinstance(key, str) or key not in known or not isinstance(text, str):
                    raise ValueError(f"{source}: expected the id of a question and a text, got {shown(record)}")
                if record.get("prompt") != known[key].prompt:
                    raise ValueError(
                        f"{source}: prompt: expected that of question {key}, got {shown(record.get('prompt'))}"
                    )
                if key in answers:
                    raise ValueError(f"{source}: id: expected a question once, got {key!r}, which {sources[key]} has")
                answers[key], sources[key] = text, source
        return answers

    def append(self, questions: Sequence[Question], texts: Sequence[str], worker: Worker) -> None:
        """Keep a batch of answers."""
        records = [
            {"id": question.id, "question_id": question.published_id, "prompt": question.prompt, "text": text}
            for question, text in zip(questions, texts, strict=True)
        ]
        append_records(self.path / f"answers.{worker.rank}-of-{worker.world_size}.jsonl", records)

    def complete(self) -> list[str]:
        """The answers in the order of the questions.

        Raises:
            ValueError: one is missing, or see `given`.
        """
        answers = self.given()
        missing = [question for question in self.questions if question.id not in answers]
        if missing:
            raise ValueError(
                f"{self.path}: expected {len(self.questions)} answers, got {len(answers)}; question {missing[0].id} "
                f"({missing[0].source}) has none"
            )
        return [answers[question.id] for question in self.questions]
