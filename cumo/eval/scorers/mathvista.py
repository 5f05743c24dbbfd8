# SPDX-License-Identifier: Apache-2.0
"""MathVista, testmini: an answer is extracted from a response, brought to its type and compared.

In lmms-eval `mathvista_testmini_cot`, `_format` and `_solution` (the official prompts, the extraction by a language
model), in VLMEvalKit `MathVista_MINI` (likewise). Without a judge only the rules below extract.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

MULTIPLE_CHOICE = "multi_choice"
_QUICK = re.compile(r'The answer is "(.*)"\.')
_BRACKETED = re.compile(r"\(([a-zA-Z])\)")


@dataclass(frozen=True)
class Problem:
    """The reference that an answer is compared with."""

    question_type: str
    """`multi_choice` or `free_form`."""
    answer_type: str
    """`text`, `integer`, `float` or `list`."""
    choices: tuple[str, ...] = ()
    precision: float | None = None
    """Decimals of a float."""
    answer: str = ""


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's: the fewest insertions, deletions and replacements that make one of the other."""
    row = list(range(len(second) + 1))
    for i, letter in enumerate(first, start=1):
        previous, row[0] = row[0], i
        for j, other in enumerate(second, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (letter != other))
    return row[-1]


def extract_by_rule(response: str, problem: Problem, *, quick: bool = False) -> str | None:
    """The answer in a response that is hardly more than it; None where a judge has to extract it.

    Args:
        response: what the model said.
        problem: whose type decides which rules hold.
        quick: also take what `The answer is "..."."` quotes, which is an option of the published extraction.
    """
    if not response or (problem.question_type == MULTIPLE_CHOICE and response in problem.choices):
        return response
    number = {"integer": int, "float": float}.get(problem.answer_type)
    if number is not None:
        try:
            return str(number(response))
        except ValueError:
            pass
    quoted = _QUICK.search(response) if quick else None
    return quoted[1] if quoted else None


def _choose(extraction: str, choices: Sequence[str]) -> str:
    """The choice that a text names by its letter, else the nearest one by edit distance."""
    text = extraction.strip()
    bracketed = _BRACKETED.search(text)
    letter = bracketed[1].upper() if bracketed else text
    index = ord(letter) - ord("A") if len(letter) == 1 else -1
    if 0 <= index < len(choices):
        return choices[index]
    return min(choices, key=lambda choice: edit_distance(letter, choice))


def normalize(extraction: str | Sequence[object], problem: Problem, *, published_quirks: bool = False) -> str | None:
    """An extracted answer in the form of the problem's type; None if it has no such form.

    Args:
        extraction: text, or a list where the answer is one.
        problem: type, choices and precision.
        published_quirks: a precision that came as a float, such as 2.0, makes every answer wrong: the published call of
            `round` fails on it.

    Raises:
        ValueError: a multiple-choice problem without choices, or a float's without precision.
    """
    if problem.question_type == MULTIPLE_CHOICE:
        if not problem.choices:
            raise ValueError("choices: expected some for a multiple-choice problem, got none")
        return _choose(str(extraction), problem.choices)
    if problem.answer_type not in ("integer", "float"):
        return str(extraction)
    try:
        value = float(str(extraction))
        if problem.answer_type == "integer":
            return str(int(value))
    except (ValueError, OverflowError):  # no number, or an infinite one
        return None
    if published_quirks and isinstance(problem.precision, float):
        return None
    if problem.precision is None:
        raise ValueError("precision: expected a number of decimals for a float, got None")
    return str(round(value, int(problem.precision)))


def is_correct(extraction: str | Sequence[object], problem: Problem, *, published_quirks: bool = False) -> bool:
    """The normalised extraction is the answer, character by character."""
    return normalize(extraction, problem, published_quirks=published_quirks) == problem.answer
