# SPDX-License-Identifier: Apache-2.0
"""The interface of a benchmark: its questions, and the score of their answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from cumo.eval.judges import Judge, JudgeSettings
from cumo.eval.questions import Question
from cumo.eval.tasks.files import Row, read_rows, unique

SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER_ANSWER = "Answer with the option's letter from the given choices directly."
SHORT_TOKENS = 128
"""Longest answer where the published evaluation batches questions over GPUs."""
LONG_TOKENS = 1024
"""Longest answer elsewhere."""


@dataclass(frozen=True)
class Scores:
    """Result of a benchmark.

    Args:
        value: the figure that the paper gives; None where a server or a judge, which there was not, decides.
        metric: what the value is.
        details: figures behind it.
        exports: files for the benchmark's own tools or server: content by name, JSON unless it is text.
        note: what whoever reads the value must know.
    """

    value: float | None
    metric: str
    details: Mapping[str, Any] = field(default_factory=dict)
    exports: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


class Task(ABC):
    """A benchmark in a folder.

    Args:
        data: folder that holds the benchmark's own, `folder`, or is it.
        published_quirks: repeat what the published evaluation gets wrong, where figures depend on it.
        judge: asked where the benchmark has one.
        judge_runs: how often it is asked for each score.

    Raises:
        ValueError: there is no such folder.
    """

    name: ClassVar[str]
    """Name on the command line."""
    title: ClassVar[str]
    """Name in the paper's table."""
    folder: ClassVar[str]
    """Folder of the published scripts, below `data/eval`."""
    max_new_tokens: ClassVar[int]
    judge_settings: ClassVar[JudgeSettings | None] = None
    """How a judge is asked, if one takes part."""

    def __init__(
        self, data: Path, *, published_quirks: bool = False, judge: Judge | None = None, judge_runs: int = 1
    ) -> None:
        self.path = data / self.folder if (data / self.folder).is_dir() else data
        if not self.path.is_dir():
            raise ValueError(f"{data / self.folder}: expected the folder of {self.name}, found none")
        if judge_runs < 1:
            raise ValueError(f"judge_runs: expected a positive number, got {judge_runs}")
        self.published_quirks = published_quirks
        self.judge = judge
        self.judge_runs = judge_runs

    @abstractmethod
    def questions(self) -> list[Question]:
        """All questions, in the order of the benchmark.

        Raises:
            ValueError: a file or a picture is absent, a row lacks something, ids repeat, or questions and references
                do not belong together; file and row are named.
        """

    @abstractmethod
    def score(self, questions: Sequence[Question], answers: Sequence[str]) -> Scores:
        """Score the answers of all questions.

        Args:
            questions: of `questions()`.
            answers: of the same questions.
        """

    def llava_questions(self, name: str, images: Path, *, unique_ids: bool = True) -> list[Question]:
        """Questions of a file in LLaVA's format: question_id, image, text, each with its picture first.

        Args:
            name: of the file.
            images: folder of the pictures.
            unique_ids: the file's ids are; otherwise a question's id gets the number of its occurrence.

        Raises:
            ValueError: see `questions`.
        """
        rows = read_rows(self.path / name)
        if unique_ids:
            unique(((row.get("question_id", str, int), row.source) for row in rows), "question_id")
        occurrences: dict[Any, int] = {}
        questions = []
        for row in rows:
            key = row.get("question_id", str, int)
            occurrences[key] = occurrences.get(key, 0) + 1
            identifier = str(key) if unique_ids else f"{key}#{occurrences[key]}"
            content = (row.picture("image", images), row.text("text"))
            questions.append(Question(identifier, content, key, row, row.source))
        return questions


def row_of(question: Question) -> Row:
    """The row that `Task.llava_questions` made the question of."""
    row = question.reference
    assert isinstance(row, Row)
    return row


def percent(flags: Sequence[bool]) -> float:
    """Share of those that hold, in percent."""
    return 100 * sum(flags) / len(flags)


def percent_by(flags: Sequence[tuple[str, bool]]) -> dict[str, float]:
    """Share of those that hold within each group, in percent; groups in alphabetical order."""
    groups: dict[str, list[bool]] = {}
    for name, flag in flags:
        groups.setdefault(name, []).append(flag)
    return {name: percent(groups[name]) for name in sorted(groups)}
