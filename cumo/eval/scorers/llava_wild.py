# SPDX-License-Identifier: Apache-2.0
"""LLaVA-Bench (in the Wild): a judge scores the answer of GPT-4 and the model's. The figure is their ratio in percent.

In lmms-eval `llava_in_the_wild` (the same prompt and ratio), in VLMEvalKit `LLaVABench` (likewise; it calls the ratio
`Relative Score`). The judge's version matters: the published figures come from gpt-4-0613.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

FAILED = (-1.0, -1.0)
"""Scores that the published evaluation assumes where it cannot read them."""

_SEPARATORS = re.compile(r"[\s,/]+")


def judge_prompt(context: str, question: str, reference: str, answer: str, *, role: str, rule: str) -> str:
    """What the judge is shown.

    Args:
        context: caption of the picture, which the judge does not see.
        question: as the model was asked.
        reference: answer of GPT-4, the first.
        answer: the model's, the second.
        role: what the rule calls those who answer.
        rule: what the judge is to do.
    """
    parts = [("Context", context), ("Question", question)]
    text = "".join(f"[{name}]\n{content}\n\n" for name, content in parts)
    for number, said in enumerate((reference, answer), start=1):
        text += f"[{role} {number}]\n{said}\n\n[End of {role} {number}]\n\n"
    return f"{text}[System]\n{rule}\n\n"


def parse_scores(reply: str, *, published_quirks: bool = False) -> tuple[float, float] | None:
    """The two numbers on the first line of a judge's reply; None if it has others.

    Args:
        reply: whose first line holds the score of GPT-4 and that of the model.
        published_quirks: split at single blanks and commas only, so that `8, 9` and `8 9 ` are not read; the result is
            then `FAILED`, not None.
    """
    line = reply.split("\n")[0]
    parts = line.replace(",", " ").split(" ") if published_quirks else _SEPARATORS.split(line.strip())
    try:
        first, second = map(float, parts)
    except ValueError:  # not two, or no numbers
        return FAILED if published_quirks else None
    return first, second


def relative_score(pairs: Iterable[tuple[float, float]]) -> float:
    """100 times the mean of the model's scores over the mean of GPT-4's.

    Args:
        pairs: (score of GPT-4, score of the model).

    Raises:
        ValueError: there are none, or the scores of GPT-4 sum to nothing.
    """
    pairs = list(pairs)
    reference = sum(first for first, _ in pairs)
    if not reference:
        raise ValueError(f"pairs: expected scores of the reference, got {len(pairs)} that sum to {reference}")
    return 100 * sum(second for _, second in pairs) / reference
