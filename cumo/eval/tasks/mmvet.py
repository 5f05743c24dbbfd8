# SPDX-License-Identifier: Apache-2.0
"""MM-Vet: `llava-mm-vet.jsonl`, `mm-vet/mm-vet.json`, `mm-vet/images/`; `judge_prompt.txt`, if any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from cumo.eval.judges import Judge, JudgeSettings
from cumo.eval.questions import Question
from cumo.eval.scorers import mmvet
from cumo.eval.tasks.base import LONG_TOKENS, Scores, Task
from cumo.eval.tasks.files import read_entries, read_json, read_text, same_keys

# The benchmark's own instruction stands in its notebook; `judge_prompt.txt` in the folder takes the place of this one.
_PROMPT = """\
Grade the prediction of an AI model against the ground truth of a question on a picture that you cannot see. <AND> in a
ground truth joins parts that must all be in the prediction; <OR> joins alternatives of which one is enough. The grade
is one of 0.0 (wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9 and 1.0 (right). Complete the last row of the table
with its grade, and write nothing but the grade.

Question | Ground truth | Prediction | Grade
--- | --- | --- | ---
What do the two signs say? | stop <AND> one way | The upper one says stop. | 0.5
What do the two signs say? | stop <AND> one way | They say "Stop" and "One Way". | 1.0
What do the two signs say? | stop <AND> one way | No parking, at any time. | 0.0
What is the total price? | 7.5 <OR> seven and a half | It comes to $7.50. | 1.0
What is the total price? | 7.5 <OR> seven and a half | It is about 7. | 0.2
How does the dog look? | It is wet, tired and looks to its owner for help. | A dog that is wet and looks up. | 0.6"""
_ATTEMPTS = 3
"""Replies without a grade before it is an error."""


class MMVet(Task):
    """Open questions that need several capabilities at once, graded by a judge."""

    name = "mmvet"
    title = "MMVet"
    folder = "mm-vet"
    max_new_tokens = LONG_TOKENS
    judge_settings = JudgeSettings(system=None, temperature=0.0, max_tokens=3)

    def questions(self) -> list[Question]:
        """See `Task.questions`."""
        asked = self.llava_questions("llava-mm-vet.jsonl", self.path / "mm-vet" / "images")
        path = self.path / "mm-vet" / "mm-vet.json"
        known = read_entries(path, read_json(path))
        same_keys(
            {_key(question): question.source for question in asked},
            {key: row.source for key, row in known.items()},
            "question",
        )
        result = []
        for question in asked:
            row = known[_key(question)]
            result.append(replace(question, reference=(row.text("answer"), tuple(row.get("capability", list)))))
        return result

    def score(self, questions: Sequence[Question], answers: Sequence[str]) -> Scores:
        """Mean of the judge's grades; by capability in the details."""
        metric = "mean grade, %"
        exports = {"mm-vet.json": {_key(question): text for question, text in zip(questions, answers, strict=True)}}
        if self.judge is None:
            return Scores(None, metric, {"questions": len(questions)}, exports, note="not graded: no judge")
        file = self.path / "judge_prompt.txt"
        instruction = read_text(file) if file.is_file() else _PROMPT
        runs = []
        for _ in range(self.judge_runs):
            grades = [
                (_grade(self.judge, instruction, question, text), question.reference[1])
                for question, text in zip(questions, answers, strict=True)
            ]
            runs.append(mmvet.by_capability(grades))
        capabilities = {name: fmean(run[name] for run in runs) for name in runs[0]}
        value = capabilities.pop("total")
        details = {"capability": capabilities, "runs": [run["total"] for run in runs], "questions": len(questions)}
        note = "" if file.is_file() else f"instruction of this project, for lack of {file.name}"
        return Scores(value, metric, details, exports, note)


def _key(question: Question) -> str:
    return f"v1_{question.published_id}"


def _grade(judge: Judge, instruction: str, question: Question, text: str) -> float:
    prompt = instruction + mmvet.judge_row(question.prompt, question.reference[0], text)
    replies = []
    for _ in range(_ATTEMPTS):
        replies.append(judge(prompt))
        grade = mmvet.parse_score(replies[-1])
        if grade is not None:
            return grade
    raise ValueError(f"{question.source}: expected a grade of 0 to 1 from the judge, got {replies}")
