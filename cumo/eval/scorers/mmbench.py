# SPDX-License-Identifier: Apache-2.0
"""MMBench and MMBench-CN: circular evaluation, in which a question counts if all rotations of its options are right.

In lmms-eval `mmbench_en_dev` and `mmbench_cn_dev` (a submission, or a judge; `_static` without one), in VLMEvalKit
`MMBench_DEV_EN` and `MMBench_DEV_CN` (the rules below, then a language model). Prompts matter more than rules here: the
Chinese figure depends on the Chinese instruction.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

ROTATION_STRIDE = 1_000_000
"""Rotations of a question have its index plus multiples of this."""
REFUSED = "Z"
"""Stands for no option: a response that declines to answer."""

_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_SENTENCE = re.compile(r"answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
_LAST_WORDS = 4  # a letter further from the end is part of the reasoning


def parse_letter(response: str, options: Iterable[str]) -> str | None:
    """The letter that a response names: the only one, among its last four words, or after "answer is"."""
    letters = list(options)
    if any(refusal in response for refusal in _REFUSALS):
        return REFUSED
    words = response.translate(_MARKS).split()
    named = [letter for letter in letters if letter in words]
    if len(named) == 1 and words.index(named[0]) >= len(words) - _LAST_WORDS:
        return named[0]
    if not named and REFUSED in words:
        return REFUSED
    found = _SENTENCE.search(response)
    return found[1].upper() if found and found[1].upper() in letters else None


def parse_text(response: str, options: Mapping[str, str]) -> str | None:
    """The letter of the only option whose text a response holds; none in a response twice as long as all of them."""
    lower = response.lower()
    if len(lower) > 2 * sum(map(len, options.values())):
        return None
    named = [letter for letter, text in options.items() if text.lower() in lower]
    return named[0] if len(named) == 1 else None


def parse(response: str, options: Mapping[str, str]) -> str | None:
    """The option that a response names by its letter or else by its text; None where a judge has to find it.

    Args:
        response: what the model said.
        options: texts by letter.
    """
    return parse_letter(response, options) or parse_text(response, options)


def circular(correct: Mapping[int, bool]) -> dict[int, bool]:
    """By question, whether all of its rotations are right.

    Args:
        correct: by index of a row, whether its answer is right.
    """
    result: dict[int, bool] = {}
    for index, right in correct.items():
        question = index % ROTATION_STRIDE
        result[question] = result.get(question, True) and right
    return result
