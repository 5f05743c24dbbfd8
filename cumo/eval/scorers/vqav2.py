# SPDX-License-Identifier: Apache-2.0
"""VQAv2: what the server of test-dev takes, and the accuracy that it computes, for the split whose answers are known.

In lmms-eval `vqav2_val` and `vqav2_test` (same formula; it normalises an answer only where the ten people disagree, as
the VQA toolkit does). VLMEvalKit has no VQAv2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from cumo.eval.scorers.textvqa import accuracy as accuracy
from cumo.eval.scorers.vqa import normalize_answer


def submission(answers: Mapping[int, str], question_ids: Iterable[int]) -> list[dict[str, int | str]]:
    """The upload: a normalised answer of every question of the test split, "" where none was asked for.

    Args:
        answers: what the model said to the questions of test-dev, by id.
        question_ids: of the whole test split.

    Raises:
        ValueError: an answer belongs to none of the questions.
    """
    ids: Sequence[int] = list(question_ids)
    unknown = answers.keys() - set(ids)
    if unknown:
        raise ValueError(f"answers: expected questions of the test split, got question_id {min(unknown)}")
    return [{"question_id": key, "answer": normalize_answer(answers[key]) if key in answers else ""} for key in ids]
