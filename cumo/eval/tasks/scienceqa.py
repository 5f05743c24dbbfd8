# SPDX-License-Identifier: Apache-2.0
"""ScienceQA: `llava_test_CQM-A.json`, `problems.json`, `pid_splits.json`, `images/test/`."""

from __future__ import annotations

from collections.abc import Sequence

from cumo.data.yaml_text import shown
from cumo.eval.questions import Question
from cumo.eval.scorers import scienceqa
from cumo.eval.tasks.base import LETTER_ANSWER, LONG_TOKENS, Scores, Task, percent
from cumo.eval.tasks.files import Row, read_entries, read_json, read_rows, same_keys, unique

_IMAGE = "<image>"
_SPLIT = "test"


class ScienceQA(Task):
    """Multiple choice, half of it with a picture."""

    name = "scienceqa"
    title = "SQA-I"
    folder = "scienceqa"
    max_new_tokens = LONG_TOKENS

    def questions(self) -> list[Question]:
        """See `Task.questions`."""
        path = self.path / "llava_test_CQM-A.json"
        rows = read_rows(path)
        unique(((row.get("id", str), row.source) for row in rows), "id")
        problems = read_json(self.path / "problems.json")
        split = read_json(self.path / "pid_splits.json").get(_SPLIT)
        if not isinstance(split, list) or not all(isinstance(key, str) and key in problems for key in split):
            raise ValueError(f"{self.path / 'pid_splits.json'}: {_SPLIT}: expected ids of problems.json")
        known = read_entries(self.path / "problems.json", {key: problems[key] for key in split})
        asked = {row.get("id", str): row.source for row in rows}
        same_keys(asked, {key: row.source for key, row in known.items()}, "id")
        return [self._question(row, known[row.get("id", str)]) for row in rows]

    def _question(self, row: Row, problem: Row) -> Question:
        turns = row.get("conversations", list)
        text = turns[0].get("value") if turns and isinstance(turns[0], dict) else None
        if not isinstance(text, str):
            raise ValueError(f"{row.source}: conversations: expected a first turn with a value, got {shown(turns)}")
        if (_IMAGE in text) != ("image" in row.values):
            raise ValueError(f"{row.source}: expected {_IMAGE} in the question with an image only, got {shown(text)}")
        choices, answer = problem.get("choices", list), problem.get("answer", int)
        if not 0 <= answer < len(choices):
            raise ValueError(f"{problem.source}: answer: expected an index of {len(choices)} choices, got {answer}")
        prompt = f"{text.replace(_IMAGE, '').strip()}\n{LETTER_ANSWER}"
        pictures = (row.picture("image", self.path / "images" / _SPLIT),) if "image" in row.values else ()
        key = row.get("id", str)
        return Question(key, (*pictures, prompt), key, (len(choices), answer), row.source)

    def score(self, questions: Sequence[Question], answers: Sequence[str]) -> Scores:
        """Accuracy over the questions with a picture; over all in the details."""
        right, with_picture = [], []
        for question, text in zip(questions, answers, strict=True):
            num_choices, answer = question.reference
            right.append(scienceqa.choice_index(text, num_choices) == answer)
            if question.pictures:
                with_picture.append(right[-1])
        details = {"all": percent(right), "questions": len(right), "questions_with_picture": len(with_picture)}
        value = percent(with_picture) if with_picture else None
        return Scores(value, "accuracy over questions with a picture, %", details)
