# SPDX-License-Identifier: Apache-2.0
"""TextVQA, validation split: soft accuracy against ten answers.

In lmms-eval `textvqa_val` (same formula; its prompt has no OCR tokens unless `ocr: true`), in VLMEvalKit `TextVQA_VAL`
(same formula, no OCR tokens). The published prompt holds OCR tokens, worth several points: figures with and without
them do not compare.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from cumo.eval.scorers.vqa import soft_accuracy

_OCR = "Reference OCR token:"


def question_of(prompt: str) -> str:
    """The question within a published prompt, in lower case: with the image, it finds the annotation.

    Args:
        prompt: `Question\\nReference OCR token: ...\\nInstruction`, also with the first two the other way round;
            `Question\\nInstruction`; or `OCR tokens: ... Question: ... Short answer:`.

    Raises:
        ValueError: it has none of these forms.
    """
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        found = re.search("Question: (.*?) Short answer:", prompt, re.DOTALL)
        if found:
            return found[1].lower()
    elif len(lines) == 3 and _OCR + " " in prompt:
        return lines[1 if prompt.startswith(_OCR) else 0].lower()
    elif len(lines) == 2:
        return lines[0].lower()
    raise ValueError(f"prompt: expected a published form of question, OCR tokens and instruction, got {prompt!r}")


def accuracy(pairs: Iterable[tuple[str, Sequence[str]]]) -> float:
    """Mean soft accuracy of (prediction, ten answers), in percent.

    Raises:
        ValueError: no pair, or one without ten answers.
    """
    scores = [soft_accuracy(prediction, answers) for prediction, answers in pairs]
    if not scores:
        raise ValueError("pairs: expected at least one, got none")
    return 100 * sum(scores) / len(scores)
