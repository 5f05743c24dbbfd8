# SPDX-License-Identifier: Apache-2.0
"""LLaVA-Bench (in the Wild): `questions.jsonl`, `context.jsonl`, `answers_gpt4.jsonl`, `rule.json`, `images/`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from cumo.data.yaml_text import shown
from cumo.eval.judges import JudgeSettings
from cumo.eval.questions import Question
from cumo.eval.scorers import llava_wild
from cumo.eval.tasks.base import LONG_TOKENS, Scores, Task, row_of
from cumo.eval.tasks.files import Row, read_entries, read_json, read_rows, same_keys, unique

_CATEGORY = "llava_bench_"


@dataclass(frozen=True)
class _Reference:
    category: str
    context: str
    answer: str
    role: str
    rule: str


class LlavaWild(Task):
    """Open questions, whose answers a judge compares with those of GPT-4."""

    name = "llava_wild"
    title = "LLaVA-W"
    folder = "llava-bench-in-the-wild"
    max_new_tokens = LONG_TOKENS
    judge_settings = JudgeSettings(
        system="You are a helpful and precise assistant for checking the quality of the answer.",
        temperature=0.2,
        max_tokens=1024,
    )

    def _contexts(self) -> dict[str, str]:
        rows = read_rows(self.path / "context.jsonl")
        unique(((row.text("image"), row.source) for row in rows), "image")
        captions = {row.text("image"): row.get("caption", str, list) for row in rows}
        for row in rows:
            if not all(isinstance(line, str) for line in row.get("caption")):
                raise ValueError(f"{row.source}: caption: expected text, got {shown(row.get('caption'))}")
        return {image: text if isinstance(text, str) else "\n".join(text) for image, text in captions.items()}

    def _answers(self) -> dict[str, Row]:
        rows = read_rows(self.path / "answers_gpt4.jsonl")
        unique(((str(row.get("question_id", str, int)), row.source) for row in rows), "question_id")
        return {str(row.get("question_id", str, int)): row for row in rows}

    def questions(self) -> list[Question]:
        """See `Task.questions`."""
        asked = self.llava_questions("questions.jsonl", self.path / "images")
        answers, contexts = self._answers(), self._contexts()
        rules = read_entries(self.path / "rule.json", read_json(self.path / "rule.json"))
        same_keys(
            {question.id: question.source for question in asked},
            {key: row.source for key, row in answers.items()},
            "question_id",
        )
        result = []
        for question in asked:
            row = row_of(question)
            image, category = row.text("image"), _CATEGORY + row.text("category")
            if image not in contexts:
                raise ValueError(f"{question.source}: image: expected one of context.jsonl, got {shown(image)}")
            if category not in rules:
                raise ValueError(f"{question.source}: category: expected one of {sorted(rules)}, got {shown(category)}")
            rule = rules[category]
            reference = _Reference(
                category, contexts[image], answers[question.id].text("text"), rule.text("role"), rule.text("prompt")
            )
            result.append(replace(question, reference=reference))
        return result

    def _judged(self, question: Question, text: str) -> tuple[float, float] | None:
        assert self.judge is not None
        known: _Reference = question.reference
        prompt = llava_wild.judge_prompt(
            known.context, question.prompt, known.answer, text, role=known.role, rule=known.rule
        )
        return llava_wild.parse_scores(self.judge(prompt), published_quirks=self.published_quirks)

    def score(self, questions: Sequence[Question], answers: Sequence[str]) -> Scores:
        """Ratio of the model's scores to those of GPT-4; by category in the details.

        A reply of the judge without scores counts as -1 for both with `published_quirks`, otherwise not at all.
        """
        metric = "score relative to GPT-4, %"
        pairs = list(zip(questions, answers, strict=True))
        exports = {"answers.json": [{"question_id": question.published_id, "text": text} for question, text in pairs]}
        if self.judge is None:
            return Scores(None, metric, {"questions": len(pairs)}, exports, note="not judged: no judge")
        runs, failed = [], 0
        for _ in range(self.judge_runs):
            groups: dict[str, list[tuple[float, float]]] = {"all": []}
            for question, text in pairs:
                scores = self._judged(question, text)
                failed += scores is None or scores == llava_wild.FAILED
                if scores is not None:
                    groups["all"].append(scores)
                    groups.setdefault(question.reference.category, []).append(scores)
            runs.append({name: llava_wild.relative_score(group) for name, group in groups.items()})
        categories = {name: fmean(run[name] for run in runs if name in run) for name in sorted({*runs[0]} - {"all"})}
        details = {"category": categories, "runs": [run["all"] for run in runs], "failed_judgements": failed}
        note = f"{failed} replies of the judge without scores" if failed else ""
        return Scores(fmean(run["all"] for run in runs), metric, {**details, "questions": len(pairs)}, exports, note)
