# SPDX-License-Identifier: Apache-2.0
"""GQA, testdev-balanced: exact match.

In lmms-eval `gqa` (exact match without case and punctuation), in VLMEvalKit `GQA_TestDev_Balanced`.
"""

from __future__ import annotations


def normalize(text: str) -> str:
    """Lower case, without periods at the end, for comparison."""
    return text.rstrip(".").lower()


def is_correct(text: str, answer: str) -> bool:
    """The normalised text is the answer, which is compared as it stands."""
    return normalize(text) == answer
