# SPDX-License-Identifier: Apache-2.0
"""MMMU, validation split: the option or the open answer within a response. The published figure is over all questions.

In lmms-eval `mmmu_val` (the same rules, another prompt, all pictures), in VLMEvalKit `MMMU_DEV_VAL` (a language model
finds the option): their figures for one model differ by up to four points.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from random import Random

DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
SUBJECTS = tuple(sorted(subject for subjects in DOMAINS.values() for subject in subjects))
PUBLISHED_SEED = 42
"""Seed of the generator behind all random choices of the published evaluation."""

_STRIPPED = ",.!?;:'"
_MIN_WORDS_FOR_TEXT = 6
_TRIVIAL = (":", ",", ".", "!", "?", ";", "'")
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # with thousands separators
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # scientific
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),  # plain
)


def parse_choice(response: str, options: Mapping[str, str], random: Random) -> str:
    """The option that a response to a multiple-choice question names.

    Letters in brackets are looked for first, then letters between blanks, then, in a response of more than five words,
    the texts of the options. Of several the one that comes last counts; if there is none, one is drawn.

    Args:
        response: what the model said.
        options: texts by letter.
        random: where a draw comes from; used only if no option is found.
    """
    for mark in _STRIPPED:
        response = response.strip(mark)
    response = f" {response} "
    lower = response.lower()
    places = {letter: response.rfind(f"({letter})") for letter in options}
    if max(places.values()) < 0:
        places = {letter: response.rfind(f" {letter} ") for letter in options}
    if max(places.values()) < 0 and len(response.split()) >= _MIN_WORDS_FOR_TEXT:
        places = {letter: lower.rfind(text.lower()) for letter, text in options.items()}
    if max(places.values()) < 0:
        return random.choice(list(options))
    return max(places, key=places.__getitem__)  # the first of those at the same place


def _normalize(text: str) -> list[str | float]:
    """A number, rounded to two decimals, or text in lower case; a single letter only matches at a word's edge."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _key_responses(response: str) -> list[str]:
    """Return from each line the shortest text after an indicator of an answer; the response if there is none."""
    response = response.strip().strip(".").lower()
    # Published is a split at sentences too, which needs capitals, and the text has just lost them.
    lines = response.split("\n")
    found = []
    for index, line in enumerate(lines):
        indicators = (*_INDICATORS, "=") if index == len(lines) - 1 else _INDICATORS
        tails = [line.rsplit(indicator, 1)[1].strip() for indicator in indicators if indicator in line]
        # An empty tail gives way to any that follows it, as published.
        shortest = ""
        for tail in tails:
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in _TRIVIAL:
            found.append(shortest)
    return found or [response]


def parse_open(response: str) -> set[str | float]:
    """Return possible answers in a response to an open question: texts where an answer stands, and their numbers."""
    texts = _key_responses(response)
    numbers = [number for text in texts for pattern in _NUMBERS for number in pattern.findall(text)]
    return {value for text in texts + numbers for value in _normalize(text)}


def is_open_correct(parsed: set[str | float], answers: Sequence[str]) -> bool:
    """A parsed number equals an answer, or an answer that is text lies within a parsed text."""
    wanted = [value for answer in answers for value in _normalize(answer)]
    texts = [value for value in wanted if isinstance(value, str)]
    return any(any(text in value for text in texts) if isinstance(value, str) else value in wanted for value in parsed)


def accuracies(correct: Mapping[str, Sequence[bool]]) -> dict[str, float]:
    """Percent of right answers, over all questions, by domain and by subject.

    Args:
        correct: by subject, whether each answer is right.

    Raises:
        ValueError: there is no answer, or a subject is unknown.
    """
    unknown = sorted(correct.keys() - set(SUBJECTS))
    if unknown or not any(correct.values()):
        raise ValueError(f"correct: expected answers in subjects of MMMU, got the subjects {sorted(correct)}")
    groups = {"overall": tuple(correct), **DOMAINS, **{subject: (subject,) for subject in correct}}
    result = {}
    for name, subjects in groups.items():
        answers = [right for subject in subjects for right in correct.get(subject, ())]
        if answers:
            result[name] = 100 * sum(answers) / len(answers)
    return result
