# SPDX-License-Identifier: Apache-2.0
"""MMMU, validation split: a folder for each subject, as on the hub, and `eval/answer_dict_val.json`, if any.

A subject's folder holds `validation-*.parquet`, or an export of it: `validation.jsonl` with the same fields, whose
pictures `image_1` to `image_7` are paths below the subject's folder.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from cumo.data.yaml_text import shown
from cumo.eval.questions import Picture, Question
from cumo.eval.scorers import mmmu
from cumo.eval.tasks.base import LETTER_ANSWER, LONG_TOKENS, SHORT_ANSWER, Scores, Task
from cumo.eval.tasks.files import Row, read_entries, read_json, read_parquet, read_rows, same_keys, unique

MULTIPLE_CHOICE = "multiple-choice"
MAX_PICTURES = 7
_PLACE = re.compile(r"<image (\d+)>")


@dataclass(frozen=True)
class _Reference:
    subject: str
    options: dict[str, str]
    """Options by letter; empty for an open question."""
    answers: tuple[str, ...]


class Mmmu(Task):
    """College-level questions in thirty subjects, some on several pictures."""

    name = "mmmu"
    title = "MMMU-v"
    folder = "MMMU"
    max_new_tokens = LONG_TOKENS

    def _rows(self, subject: str) -> list[Row]:
        folder = self.path / subject
        exported = folder / "validation.jsonl"
        return read_rows(exported) if exported.is_file() else read_parquet(folder / "validation-*.parquet")

    def questions(self) -> list[Question]:
        """See `Task.questions`."""
        subjects = [subject for subject in mmmu.SUBJECTS if (self.path / subject).is_dir()]
        if len(subjects) < len(mmmu.SUBJECTS):
            missing = min(set(mmmu.SUBJECTS) - set(subjects))
            raise ValueError(f"{self.path}: expected folders of thirty subjects, found none of {missing}")
        questions = [self._question(subject, row) for subject in subjects for row in self._rows(subject)]
        unique(((question.id, question.source) for question in questions), "id")
        path = self.path / "eval" / "answer_dict_val.json"
        if not path.is_file():
            return questions
        known = read_entries(path, read_json(path))
        same_keys(
            {question.id: question.source for question in questions},
            {key: row.source for key, row in known.items()},
            "id",
        )
        return [_with_answers(question, known[question.id]) for question in questions]

    def _question(self, subject: str, row: Row) -> Question:
        kind, text = row.text("question_type"), row.text("question")
        options = _options(row) if kind == MULTIPLE_CHOICE else {}
        if options:
            lines = "".join(f"({letter}) {option}\n" for letter, option in options.items())
            text = f"{text}\n{lines}\n{LETTER_ANSWER.rstrip('.')}"  # published without its period
        else:
            text = f"{text}\n{SHORT_ANSWER}"
        pictures = _pictures(row, self.path / subject)
        if 1 not in pictures:
            raise ValueError(f"{row.source}: image_1: expected a picture, found none")
        if self.published_quirks or (len(pictures) == 1 and {*_PLACE.findall(text)} <= {"1"}):
            content: tuple[str | Picture, ...] = (pictures[1], text.replace("<image 1>", "").strip())
        else:
            content = _interleave(text, pictures, row.source)
        answer = row.text("answer")
        reference = _Reference(subject, options, _answers(answer) if not options else (answer,))
        if options and answer not in options:
            raise ValueError(f"{row.source}: answer: expected one of {list(options)}, got {shown(answer)}")
        key = row.text("id")
        return Question(key, content, key, reference, row.source)

    def score(self, questions: Sequence[Question], answers: Sequence[str]) -> Scores:
        """Accuracy over all questions; by domain and subject in the details.

        Where no option is found one is drawn: from one generator for all questions with `published_quirks`, otherwise
        from one that the question's id seeds, so that it does not depend on other answers.
        """
        shared = Random(mmmu.PUBLISHED_SEED)
        correct: dict[str, list[bool]] = {}
        output = {}
        for question, text in zip(questions, answers, strict=True):
            known: _Reference = question.reference
            if known.options:
                random = shared if self.published_quirks else Random(question.id)
                choice = mmmu.parse_choice(text, known.options, random)
                right = choice in known.answers
            else:
                choice = text
                right = mmmu.is_open_correct(mmmu.parse_open(text), known.answers)
            output[question.id] = choice
            correct.setdefault(known.subject, []).append(right)
        accuracies = mmmu.accuracies(correct)
        value = accuracies.pop("overall")
        details = {"accuracy": accuracies, "questions": len(questions)}
        note = "first picture only, as published" if self.published_quirks else ""
        return Scores(value, "accuracy, %", details, {"output.json": output}, note)


def _literal_list(text: str, source: str) -> list[str]:
    """The list of strings that a Python literal spells."""
    try:
        values = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"{source}: expected a list, got {shown(text)}") from error
    if not isinstance(values, list):
        raise ValueError(f"{source}: expected a list, got {shown(text)}")
    return [str(value) for value in values]


def _options(row: Row) -> dict[str, str]:
    values: Any = row.get("options", str, list)
    texts = _literal_list(values, f"{row.source}: options") if isinstance(values, str) else list(map(str, values))
    if not 1 < len(texts) <= 26:
        raise ValueError(f"{row.source}: options: expected 2 to 26, got {len(texts)}")
    return {chr(ord("A") + index): text for index, text in enumerate(texts)}


def _answers(text: str) -> tuple[str, ...]:
    """Parse the answers to an open question, several of which may be spelt as a list."""
    try:
        return tuple(_literal_list(text, ""))
    except ValueError:  # one answer
        return (text,)


def _pictures(row: Row, folder: Path) -> dict[int, Picture]:
    pictures = {}
    for number in range(1, MAX_PICTURES + 1):
        key = f"image_{number}"
        value = row.values.get(key)
        if isinstance(value, dict) and value.get("bytes"):
            pictures[number] = Picture(f"{row.values.get('id')} {key}", value["bytes"])
        elif isinstance(value, str):
            pictures[number] = row.picture(key, folder)
        elif value is not None:
            raise ValueError(f"{row.source}: {key}: expected a picture, got {type(value).__name__} without one")
    return pictures


def _interleave(text: str, pictures: dict[int, Picture], source: str) -> tuple[str | Picture, ...]:
    """Each picture where the text first names it; those that it does not name come before it."""
    named = [int(number) for number in _PLACE.findall(text)]
    unknown = set(named) - set(pictures)
    if unknown:
        raise ValueError(f"{source}: expected a picture image_{min(unknown)}, which the question names, found none")
    content: list[str | Picture] = [pictures[number] for number in pictures if number not in named]
    shown: set[int] = set()
    end = 0
    for place in _PLACE.finditer(text):
        number = int(place[1])
        if number in shown:
            continue  # the name stays, and refers to what was shown
        shown.add(number)
        content += [text[end : place.start()], pictures[number]]
        end = place.end()
    content.append(text[end:])
    parts = [part.strip() if isinstance(part, str) else part for part in content]
    return tuple(part for part in parts if part)


def _with_answers(question: Question, known: Row) -> Question:
    """The question with the answers of the published evaluation's own file."""
    truth: Any = known.get("ground_truth", str, list)
    reference: _Reference = question.reference
    if (known.get("question_type", str) == MULTIPLE_CHOICE) != bool(reference.options):
        raise ValueError(f"{known.source}: question_type: expected that of {question.source}, got another")
    answers = tuple(map(str, truth)) if isinstance(truth, list) else (truth,)
    new = _Reference(reference.subject, reference.options, answers)
    return Question(question.id, question.content, question.published_id, new, question.source)
