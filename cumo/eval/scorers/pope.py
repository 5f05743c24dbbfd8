# SPDX-License-Identifier: Apache-2.0
"""POPE: is an object in the picture? The published figure is the mean F1 of its three categories.

In lmms-eval `pope` (F1 over all categories pooled, and its yes ratio counts the labels), in VLMEvalKit `POPE` (letters
and words matched by other rules).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_NEGATIONS = ("No", "not", "no")


@dataclass(frozen=True)
class Counts:
    """How predictions meet labels; "yes" is the positive class."""

    true_positive: int
    false_positive: int
    true_negative: int
    false_negative: int

    @property
    def total(self) -> int:
        """Number of questions."""
        return self.true_positive + self.false_positive + self.true_negative + self.false_negative

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return (self.true_positive + self.true_negative) / self.total

    @property
    def precision(self) -> float:
        """Share of "yes" that are right; 0 if the model never says yes."""
        said = self.true_positive + self.false_positive
        return self.true_positive / said if said else 0.0

    @property
    def recall(self) -> float:
        """Share of present objects that were seen; 0 if there are none."""
        present = self.true_positive + self.false_negative
        return self.true_positive / present if present else 0.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 0 if both are."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0

    @property
    def yes_ratio(self) -> float:
        """Share of "yes" among the predictions."""
        return (self.true_positive + self.false_positive) / self.total


def says_yes(text: str) -> bool:
    """False if the first sentence, without commas and split at blanks, has a word `No`, `no` or `not`.

    Other spellings, as `NO` or `None`, count as yes, and so does a `no` that touches a line break: as published.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return not any(word in _NEGATIONS for word in words)


def count(predictions: Sequence[str], labels: Sequence[str]) -> Counts:
    """Compare answers with the labels "yes" and "no" of the same questions.

    Raises:
        ValueError: the lengths differ, there are none, or a label is neither.
    """
    if len(predictions) != len(labels) or not labels:
        raise ValueError(f"predictions: expected one for each of {len(labels)} labels, got {len(predictions)}")
    for index, label in enumerate(labels):
        if label not in ("yes", "no"):
            raise ValueError(f"labels: expected yes or no, got {label!r} as label {index}")
    pairs = [(says_yes(text), label == "yes") for text, label in zip(predictions, labels, strict=True)]
    return Counts(
        pairs.count((True, True)), pairs.count((True, False)), pairs.count((False, False)), pairs.count((False, True))
    )
