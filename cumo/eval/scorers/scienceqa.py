# SPDX-License-Identifier: Apache-2.0
"""ScienceQA, test split: the letter of an option. The published figure covers the questions with a picture.

In lmms-eval `scienceqa_img` (compares the first letter of the answer), in VLMEvalKit `ScienceQA_TEST` (rules, then a
language model finds the option).
"""

from __future__ import annotations

import re

OPTIONS = ("A", "B", "C", "D", "E")
FAILED = "FAILED"
# The last dot of the published pattern matches any character: a letter that ends the text is not found.
_SENTENCE = re.compile(r"The answer is ([A-Z]).")


def parse(text: str) -> str:
    """The option that a text names, or `FAILED`.

    That is the text itself if it is one of A to E, its first letter if ". " follows, or the letter of the only
    `The answer is X` that another character follows.
    """
    if text in OPTIONS:
        return text
    if text[:1] in OPTIONS and text[1:3] == ". ":
        return text[0]
    found = _SENTENCE.findall(text)
    return found[0] if len(found) == 1 else FAILED


def choice_index(text: str, num_choices: int) -> int:
    """Index of the option that a text names, -1 if it names none of the first `num_choices`."""
    answer = parse(text)
    return OPTIONS.index(answer) if answer in OPTIONS[:num_choices] else -1
