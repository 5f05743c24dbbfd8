# SPDX-License-Identifier: Apache-2.0
"""MathVista, testmini: `data/testmini.json` with pictures below `data/`, or `data/testmini-*.parquet`, as on the hub.

`extraction_prompt.txt` in the folder, if any, takes the place of the instruction for the judge.
"""

from __future__ import annotations

from collections.abc import Sequence

from cumo.data.yaml_text import shown
from cumo.eval.judges import JudgeSettings
from cumo.eval.questions import Picture, Question
from cumo.eval.scorers import mathvista
from cumo.eval.tasks.base import LONG_TOKENS, Scores, Task, percent, percent_by
from cumo.eval.tasks.files import Row, read_entries, read_json, read_parquet, read_text, unique

_PROMPT = """\
Each example shows a question on a picture, the response of a model, and the answer that the response arrives at.
Extract the answer of the last one. Write nothing but the answer.

Hint: Please answer the question requiring an integer answer and provide the final value, e.g., 1, 2, 3, at the end.
Question: How many bars are taller than 20?

Model response: Of the bars shown, the second, third and sixth exceed 20, so there are 3 of them.

Extracted answer: 3

Hint: Please answer the question requiring a floating-point number with one decimal place and provide the final value, \
e.g., 1.2, 1.3, 1.4, at the end.
Question: What is the mean height of the two trees? (Unit: m)

Model response: One tree is 4 m high, the other 5 m. Their mean height is 4.5 m.

Extracted answer: 4.5

Hint: Please answer the question requiring a Python list as an answer and provide the final list, e.g., [1, 2, 3], \
[1.2, 1.3, 1.4], at the end.
Question: In which two years were sales equal?

Model response: The lines cross between the points of 1998 and 2003, where sales were equal.

Extracted answer: [1998, 2003]

Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.
Question: Which angle is obtuse?
Choices:
(A) x
(B) y
(C) z

Model response: The angle at y measures 120 degrees and is therefore obtuse.

Extracted answer: B"""
_GROUPS = ("language", "source", "category", "task", "context", "grade")


class MathVista(Task):
    """Mathematics on pictures. The answer is extracted from the response before it is compared."""

    name = "mathvista"
    title = "MathVista"
    folder = "mathvista"
    max_new_tokens = LONG_TOKENS
    judge_settings = JudgeSettings(
        system="You are a helpful and precise assistant for checking the quality of the answer.",
        temperature=0.0,
        max_tokens=256,
    )

    def questions(self) -> list[Question]:
        """See `Task.questions`."""
        path = self.path / "data" / "testmini.json"
        if path.is_file():
            rows = list(read_entries(path, read_json(path)).values())
        else:
            rows = read_parquet(self.path / "data" / "testmini-*.parquet")
        unique(((str(row.get("pid", str, int)), row.source) for row in rows), "pid")
        return [self._question(row) for row in rows]

    def _question(self, row: Row) -> Question:
        encoded = row.values.get("decoded_image")
        if isinstance(encoded, dict) and encoded.get("bytes"):
            picture = Picture(row.text("image"), encoded["bytes"])
        else:
            picture = row.picture("image", self.path / "data")
        for name, expected in (("choices", list), ("precision", (int, float)), ("metadata", dict)):
            value = row.values.get(name)
            if value is not None and not isinstance(value, expected):
                raise ValueError(f"{row.source}: {name}: expected another type, got {shown(value)}")
        if not isinstance((row.values.get("metadata") or {}).get("skills", []), list):
            raise ValueError(f"{row.source}: metadata: expected a list of skills, got {shown(row.values['metadata'])}")
        choices = row.values.get("choices") or ()
        kind = row.text("question_type")
        problem = mathvista.Problem(
            kind, row.text("answer_type"), tuple(map(str, choices)), row.values.get("precision"), row.text("answer")
        )
        if kind == mathvista.MULTIPLE_CHOICE and problem.answer not in problem.choices:
            raise ValueError(f"{row.source}: answer: expected one of {list(choices)}, got {shown(problem.answer)}")
        if kind != mathvista.MULTIPLE_CHOICE and problem.answer_type == "float" and problem.precision is None:
            raise ValueError(f"{row.source}: precision: expected a number of decimals for a float, got none")
        # Published is the bare question; the benchmark's own prompt says what form of answer it wants.
        prompt = row.text("question" if self.published_quirks else "query")
        key = str(row.get("pid", str, int))
        return Question(key, (picture, prompt), key, (problem, row), row.source)

    def _extract(self, text: str, problem: mathvista.Problem, row: Row) -> tuple[str, str]:
        """The answer in a response, and who found it."""
        extraction = mathvista.extract_by_rule(text, problem, quick=self.judge is None)
        if extraction is not None:
            return extraction, "rule"
        if self.judge is None:
            return text, "nobody"
        file = self.path / "extraction_prompt.txt"
        instruction = read_text(file) if file.is_file() else _PROMPT
        reply = self.judge(f"{instruction.strip()}\n\n{row.text('query')}\n\n{text}\n\nExtracted answer: ")
        return reply.strip(), "judge"

    def score(self, questions: Sequence[Question], answers: Sequence[str]) -> Scores:
        """Accuracy; by type of question and answer, and by the benchmark's own groups, in the details.

        Without a judge a response that no rule fits is compared as it stands.
        """
        found = dict.fromkeys(("rule", "judge", "nobody"), 0)
        right, output = [], {}
        groups: dict[str, list[tuple[str, bool]]] = {}
        for question, text in zip(questions, answers, strict=True):
            problem, row = question.reference
            extraction, finder = self._extract(text, problem, row)
            found[finder] += 1
            right.append(mathvista.is_correct(extraction, problem, published_quirks=self.published_quirks))
            output[question.id] = {"response": text, "extraction": extraction, "true_false": right[-1]}
            metadata = row.values.get("metadata") or {}
            kinds = [("question_type", problem.question_type), ("answer_type", problem.answer_type)]
            kinds += [(name, metadata[name]) for name in _GROUPS if name in metadata]
            kinds += [("skills", skill) for skill in metadata.get("skills", ())]
            for group, kind in kinds:
                groups.setdefault(group, []).append((str(kind), right[-1]))
        details = {name: percent_by(flags) for name, flags in groups.items()}
        details |= {"found_by": {name: float(number) for name, number in found.items()}}
        note = f"{found['nobody']} answers extracted by nobody: no judge" if found["nobody"] else ""
        exports = {"responses.json": output}
        return Scores(percent(right), "accuracy, %", {**details, "questions": len(right)}, exports, note)
