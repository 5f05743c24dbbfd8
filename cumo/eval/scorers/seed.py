# SPDX-License-Identifier: Apache-2.0
"""SEED-Bench: the letter of an option, and nothing but it. The published figure covers the questions on pictures.

In lmms-eval `seedbench` (compares the first character), in VLMEvalKit `SEEDBench_IMG` (rules, then a language model).
"""

from __future__ import annotations


def is_correct(text: str, answer: str) -> bool:
    """Strict equality: `A.` is not `A`."""
    return text == answer
