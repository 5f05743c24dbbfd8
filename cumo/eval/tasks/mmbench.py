# SPDX-License-Identifier: Apache-2.0
"""MMBench and MMBench-CN: `mmbench_dev_20230712.tsv`, `mmbench_dev_cn_20231003.tsv`, which hold their pictures."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from cumo.data.yaml_text import shown
from cumo.eval.judges import JudgeSettings
from cumo.eval.questions import Picture, Question
from cumo.eval.scorers import mmbench
from cumo.eval.tasks.base import LETTER_ANSWER, LONG_TOKENS, Scores, Task, percent, percent_by
from cumo.eval.tasks.files import Row, read_table, unique

_LETTERS = "ABCD"
_JUDGE = """\
Which option does the answer to this question choose? Compare meanings, not words. Reply with the letter of the option
alone, or with Z if the answer chooses none of them.

Question: {question}
Options:
{options}
Answer: {answer}
Letter:"""


@dataclass(frozen=True)
class _Reference:
    index: int
    question: str
    options: dict[str, str]
    answer: str
    category: str


class MMBench(Task):
    """Multiple choice with rotated options: a question counts if all of its rotations are right."""

    name = "mmbench"
    title = "MMB"
    folder = "mmbench"
    file: ClassVar[str] = "mmbench_dev_20230712.tsv"
    instruction: ClassVar[str] = LETTER_ANSWER
    max_new_tokens = LONG_TOKENS
    judge_settings = JudgeSettings(system=None, temperature=0.0, max_tokens=16)

    def questions(self) -> list[Question]:
        """See `Task.questions`."""
        rows = read_table(self.path / self.file)
        unique(((_index(row), row.source) for row in rows), "index")
        images = {_index(row): row.cell("image") for row in rows}
        return [self._question(row, images) for row in rows]

    def _question(self, row: Row, images: dict[int, str | None]) -> Question:
        index, question, answer = _index(row), row.cell("question"), row.cell("answer")
        options: dict[str, str] = {}
        for letter in _LETTERS:
            text = row.cell(letter)
            if text is None:
                break
            options[letter] = text
        if question is None or answer not in options:
            raise ValueError(
                f"{row.source}: expected a question and one of {list(options)} as answer, got {shown(answer)}"
            )
        hint = row.cell("hint")
        prompt = question if hint is None else f"{hint}\n{question}"
        prompt = "\n".join((prompt, *(f"{letter}. {text}" for letter, text in options.items()), self.instruction))
        reference = _Reference(index, question, options, answer, row.cell("category") or "")
        picture = Picture(f"index {index}", _decode(row, images))
        return Question(str(index), (picture, prompt), index, reference, row.source)

    def _choice(self, text: str, known: _Reference) -> tuple[str | None, str]:
        """The option that an answer names, and who found it."""
        letter = mmbench.parse(text, known.options)
        if letter is not None or self.judge is None:
            return letter, "rule" if letter is not None else "nobody"
        options = "\n".join(f"{letter}. {option}" for letter, option in known.options.items())
        reply = self.judge(_JUDGE.format(question=known.question, options=options, answer=text))
        letter = mmbench.parse_letter(reply, known.options)
        return letter, "judge" if letter is not None else "nobody"

    def score(self, questions: Sequence[Question], answers: Sequence[str]) -> Scores:
        """Circular accuracy; that of single rows, and by category, in the details. Naming no option is wrong."""
        right: dict[int, bool] = {}
        found = dict.fromkeys(("rule", "judge", "nobody"), 0)
        upload = ["\t".join(("index", "question", *_LETTERS, "answer", "prediction"))]
        for question, text in zip(questions, answers, strict=True):
            known: _Reference = question.reference
            letter, finder = self._choice(text, known)
            found[finder] += 1
            right[known.index] = letter == known.answer
            cells = (known.question, *(known.options.get(each, "") for each in _LETTERS), known.answer, text)
            upload.append("\t".join((str(known.index), *(" ".join(cell.split()) for cell in cells))))
        circular = mmbench.circular(right)
        category = {
            question.reference.index % mmbench.ROTATION_STRIDE: question.reference.category for question in questions
        }
        details = {
            "rows": percent(list(right.values())),
            "category": percent_by([(category[index], flag) for index, flag in circular.items()]),
            "found_by": found,
            "questions": len(circular),
            "num_rows": len(right),
        }
        note = f"{found['nobody']} answers name no option" if found["nobody"] else ""
        exports = {"upload.tsv": "\n".join(upload) + "\n"}
        return Scores(percent(list(circular.values())), "circular accuracy, %", details, exports, note)


class MMBenchChinese(MMBench):
    """The same in Chinese."""

    name = "mmbench_cn"
    title = "MMB-CN"
    file = "mmbench_dev_cn_20231003.tsv"
    instruction = "请直接回答选项字母。"


def _index(row: Row) -> int:
    text = row.cell("index")
    if text is None or not text.isdecimal():
        raise ValueError(f"{row.source}: index: expected a number, got {shown(text)}")
    return int(text)


def _decode(row: Row, images: dict[int, str | None]) -> bytes:
    """The row's picture; instead of one, the index of another row that holds it may stand there."""
    text = row.cell("image")
    if text is not None and text.isdecimal():
        text = images.get(int(text))
    if text is None:
        raise ValueError(f"{row.source}: image: expected a picture, found none")
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"{row.source}: image: expected base64, got {error}") from error
