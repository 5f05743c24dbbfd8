# SPDX-License-Identifier: Apache-2.0
"""MM-Vet: a judge gives each open answer 0 to 1. The published figure is the mean of three runs, in percent.

In lmms-eval `mmvet` (another judge, and a prompt that asks for reasoning), in VLMEvalKit `MMVet` (another judge).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# The score stands first; what follows it, if anything, is the judge's comment.
_SCORE = re.compile(r"(?:0(?:\.\d+)?|1(?:\.0+)?)(?![\w.])")


def judge_row(question: str, answer: str, prediction: str) -> str:
    """The last row of the judge's table, whose final cell the judge is to fill in.

    Args:
        question: as the model was asked; it stays one line of the table.
        answer: of the benchmark, whose `<AND>` and `<OR>` are set apart.
        prediction: what the model said.
    """
    for word in ("<AND>", "<OR>"):
        answer = answer.replace(word, f" {word} ")
    return "\n" + " | ".join([question.replace("\n", "<br>"), answer, prediction, ""])


def parse_score(reply: str) -> float | None:
    """The score at the start of a judge's reply; None if there is none between 0 and 1."""
    found = _SCORE.match(reply.strip())
    return float(found[0]) if found else None


def by_capability(scores: Iterable[tuple[float, Iterable[str]]]) -> dict[str, float]:
    """Mean score in percent, over all answers (`total`) and over those that need a capability.

    Args:
        scores: (score, capabilities that the question needs).

    Raises:
        ValueError: there are none.
    """
    groups: dict[str, list[float]] = {"total": []}
    for score, capabilities in scores:
        for name in ("total", *capabilities):
            groups.setdefault(name, []).append(score)
    if not groups["total"]:
        raise ValueError("scores: expected at least one, got none")
    return {name: 100 * sum(values) / len(values) for name, values in groups.items()}
