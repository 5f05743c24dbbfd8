# SPDX-License-Identifier: Apache-2.0
"""MME: two yes-or-no questions per picture in fourteen subtasks. The published figure is the sum over perception.

In lmms-eval `mme` and in VLMEvalKit `MME` (both find yes and no by the same four letters or whole words; same sums).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
QUESTIONS_PER_IMAGE = 2


def parse(text: str) -> str:
    """`yes`, `no` or `other`, whichever stands within the first four characters, in any case."""
    start = text.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def task_score(rows: Iterable[tuple[str, str, str]]) -> float:
    """Score of a subtask, 0 to 200: percent of right answers plus percent of pictures with both answers right.

    Args:
        rows: (image, text, answer), of which the answer is yes or no in any case.

    Raises:
        ValueError: there are none, or a picture does not have two.
    """
    right: dict[str, list[bool]] = {}
    for image, text, answer in rows:
        right.setdefault(image, []).append(parse(text) == answer.strip().lower())
    if not right:
        raise ValueError("rows: expected at least one, got none")
    for image, both in right.items():
        if len(both) != QUESTIONS_PER_IMAGE:
            raise ValueError(f"rows: expected {QUESTIONS_PER_IMAGE} questions on a picture, got {len(both)} on {image}")
    accuracy = sum(map(sum, right.values())) / (QUESTIONS_PER_IMAGE * len(right))
    return 100 * (accuracy + sum(map(all, right.values())) / len(right))


def totals(scores: Mapping[str, float]) -> dict[str, float]:
    """Sums over the subtasks of perception (at most 2000) and of cognition (at most 800).

    Raises:
        ValueError: a subtask is absent or unknown.
    """
    known = {*PERCEPTION, *COGNITION}
    if scores.keys() != known:
        raise ValueError(
            f"scores: expected the fourteen subtasks, got none of {sorted(known - scores.keys())} "
            f"and the unknown {sorted(scores.keys() - known)}"
        )
    return {
        "perception": sum(scores[name] for name in PERCEPTION),
        "cognition": sum(scores[name] for name in COGNITION),
    }
