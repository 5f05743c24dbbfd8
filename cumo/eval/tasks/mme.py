# SPDX-License-Identifier: Apache-2.0
"""MME: `llava_mme.jsonl`, and the benchmark's own folder `MME_Benchmark_release_version/`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from cumo.data.yaml_text import shown
from cumo.eval.questions import Question
from cumo.eval.scorers import mme
from cumo.eval.tasks.base import SHORT_ANSWER, SHORT_TOKENS, Scores, Task
from cumo.eval.tasks.files import read_text, same_keys, unique

_RELEASE = "MME_Benchmark_release_version"
_INSTRUCTION = "Please answer yes or no."

Key = tuple[str, str, str]
"""Subtask, picture without ending, question without instructions."""


class Mme(Task):
    """Two yes-or-no questions per picture in fourteen subtasks."""

    name = "mme"
    title = "MME"
    folder = "MME"
    max_new_tokens = SHORT_TOKENS

    def _references(self) -> dict[Key, tuple[str, str]]:
        """(answer, source) of every question of the benchmark."""
        references: dict[Key, tuple[str, str]] = {}
        for subtask in (*mme.PERCEPTION, *mme.COGNITION):
            folder = self.path / _RELEASE / subtask
            nested = folder / "questions_answers_YN"
            paths = sorted((nested if nested.is_dir() else folder).glob("*.txt"))
            if not paths:
                raise ValueError(f"{folder}: expected text files with questions and answers, found none")
            for path in paths:
                references |= _read_answers(path, subtask)
        return references

    def questions(self) -> list[Question]:
        """See `Task.questions`."""
        references = self._references()
        asked = self.llava_questions("llava_mme.jsonl", self.path / _RELEASE, unique_ids=False)
        keys = [_key(str(question.published_id), question.prompt) for question in asked]
        unique(((key, question.source) for key, question in zip(keys, asked, strict=True)), "question")
        sources = {key: question.source for key, question in zip(keys, asked, strict=True)}
        same_keys(sources, {key: source for key, (_, source) in references.items()}, "question")
        return [
            replace(question, reference=(*key[:2], references[key][0]))
            for key, question in zip(keys, asked, strict=True)
        ]

    def score(self, questions: Sequence[Question], answers: Sequence[str]) -> Scores:
        """Sum over the subtasks of perception; each of them, and cognition, in the details."""
        rows: dict[str, list[tuple[str, str, str]]] = {}
        tables: dict[str, str] = {}
        for question, text in zip(questions, answers, strict=True):
            subtask, image, answer = question.reference
            rows.setdefault(subtask, []).append((image, text, answer))
            line = "\t".join((question.pictures[0].name, question.prompt, answer, text)).replace("\n", " ")
            name = f"{subtask}.txt"
            tables[name] = tables.get(name, "") + line + "\n"
        scores = {subtask: mme.task_score(rows[subtask]) for subtask in rows}
        totals = mme.totals(scores)
        return Scores(totals["perception"], "sum over perception, of 2000", {**totals, "subtasks": scores}, tables)


def _question_text(prompt: str) -> str:
    """A question without its instructions and with single blanks: files differ in both."""
    return " ".join(prompt.replace(SHORT_ANSWER, "").replace(_INSTRUCTION, "").split())


def _key(published_id: str, prompt: str) -> Key:
    path = PurePosixPath(published_id)
    return path.parts[0], path.name.split(".")[0], _question_text(prompt)


def _read_answers(path: Path, subtask: str) -> dict[Key, tuple[str, str]]:
    """Questions and answers on one picture: a line each, parted by a tab."""
    result: dict[Key, tuple[str, str]] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        source = f"{path}: line {number}"
        text, tab, answer = line.rpartition("\t")
        if not tab or answer.strip().lower() not in ("yes", "no"):
            raise ValueError(f"{source}: expected a question, a tab and Yes or No, got {shown(line)}")
        key = (subtask, path.name.split(".")[0], _question_text(text))
        if key in result:
            raise ValueError(f"{source}: expected another question than that of {result[key][1]}, got {shown(text)}")
        result[key] = answer.strip(), source
    return result
