# SPDX-License-Identifier: Apache-2.0
"""VQAv2: `llava_vqav2_mscoco_test-dev2015.jsonl`, `llava_vqav2_mscoco_test2015.jsonl`, `test2015/`.

A server scores test-dev. The validation split, whose answers are public, comes in the files of the VQA toolkit:
`v2_OpenEnded_mscoco_val2014_questions.json`, `v2_mscoco_val2014_annotations.json`, `val2014/`.
"""

from __future__ import annotations

from collections.abc import Sequence

from cumo.data.yaml_text import shown
from cumo.eval.questions import Picture, Question
from cumo.eval.scorers import vqav2
from cumo.eval.scorers.vqa import NUM_ANSWERS
from cumo.eval.tasks.base import SHORT_ANSWER, SHORT_TOKENS, Scores, Task
from cumo.eval.tasks.files import Row, read_entries, read_json, read_rows, same_keys, unique


class VqaV2(Task):
    """Test-dev: the result is a file to upload."""

    name = "vqav2"
    title = "VQAv2"
    folder = "vqav2"
    max_new_tokens = SHORT_TOKENS

    def _all_ids(self) -> list[int]:
        rows = read_rows(self.path / "llava_vqav2_mscoco_test2015.jsonl")
        unique(((row.get("question_id", int), row.source) for row in rows), "question_id")
        return [row.get("question_id", int) for row in rows]

    def questions(self) -> list[Question]:
        """See `Task.questions`."""
        questions = self.llava_questions("llava_vqav2_mscoco_test-dev2015.jsonl", self.path / "test2015")
        known = set(self._all_ids())
        for question in questions:
            if question.published_id not in known:
                raise ValueError(f"{question.source}: question_id: expected one of the test split, got {question.id}")
        return questions

    def score(self, questions: Sequence[Question], answers: Sequence[str]) -> Scores:
        """No figure, but the file that the server takes."""
        said = {int(question.published_id): text for question, text in zip(questions, answers, strict=True)}
        upload = vqav2.submission(said, self._all_ids())
        return Scores(
            None,
            "soft accuracy, %",
            {"questions": len(questions), "uploaded": len(upload)},
            {"upload.json": upload},
            note="upload.json is for the server",
        )


class VqaV2Validation(Task):
    """The validation split, scored here."""

    name = "vqav2_val"
    title = "VQAv2 val"
    folder = "vqav2"
    max_new_tokens = SHORT_TOKENS

    def _rows(self, name: str, key: str) -> dict[str, Row]:
        path = self.path / name
        entries = read_json(path).get(key)
        if not isinstance(entries, list):
            raise ValueError(f"{path}: expected a list of {key}, got {type(entries).__name__}")
        rows = read_entries(path, {f"{key} {index}": entry for index, entry in enumerate(entries)}).values()
        unique(((row.get("question_id", int), row.source) for row in rows), "question_id")
        return {str(row.get("question_id", int)): row for row in rows}

    def questions(self) -> list[Question]:
        """See `Task.questions`."""
        asked = self._rows("v2_OpenEnded_mscoco_val2014_questions.json", "questions")
        known = self._rows("v2_mscoco_val2014_annotations.json", "annotations")
        same_keys(
            {key: row.source for key, row in asked.items()}, {key: row.source for key, row in known.items()}, "id"
        )
        result = []
        for key, row in asked.items():
            entries = known[key].get("answers", list)
            if not all(isinstance(entry, dict) for entry in entries):
                raise ValueError(f"{known[key].source}: answers: expected objects, got {shown(entries)}")
            people = [Row(entry, known[key].source).text("answer") for entry in entries]
            if len(people) != NUM_ANSWERS:
                raise ValueError(f"{known[key].source}: answers: expected {NUM_ANSWERS}, got {len(people)}")
            name = f"COCO_val2014_{row.get('image_id', int):012d}.jpg"
            path = self.path / "val2014" / name
            if not path.is_file():
                raise ValueError(f"{row.source}: image_id: expected a picture {path}, found none")
            content = (Picture(name, path), f"{row.text('question')}\n{SHORT_ANSWER}")
            result.append(Question(key, content, int(key), people, row.source))
        return result

    def score(self, questions: Sequence[Question], answers: Sequence[str]) -> Scores:
        """Mean soft accuracy."""
        people = [question.reference for question in questions]
        value = vqav2.accuracy(zip(answers, people, strict=True))
        return Scores(value, "soft accuracy, %", {"questions": len(questions)})
