# SPDX-License-Identifier: Apache-2.0
"""Batches of plain and of packed examples."""

import pytest
import torch

from cumo.data import Collator


def example(length, images=0, first=1, **more):
    made = {
        "input_ids": torch.arange(first, first + length),
        "labels": torch.arange(length),
        "row": torch.tensor([length]),
    }
    if images:
        made["pixel_values"] = torch.full((images, 3, 2, 2), float(length))
    return {**made, **more}


def test_padding_on_the_right():
    batch = Collator(99)([example(3), example(2, images=2), example(1, images=1)])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [1, 2, 99], [1, 99, 99]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert batch["labels"].tolist() == [[0, 1, 2], [0, 1, -100], [0, -100, -100]]
    assert batch["pixel_values"].shape == (3, 3, 2, 2) and batch["pixel_values"][:, 0, 0, 0].tolist() == [2, 2, 1]
    assert set(batch) == {"input_ids", "attention_mask", "labels", "pixel_values"}


def test_without_pictures_and_with_rows():
    batch = Collator(0, rows=True)([example(3), example(2)])
    assert "pixel_values" not in batch and batch["rows"].tolist() == [3, 2]


def test_larger_pictures():
    batch = Collator(0)([example(3, images=1, pixel_values_large=torch.zeros(1, 3, 4, 4)), example(2)])
    assert [image.shape for image in batch["pixel_values_large"]] == [(1, 3, 4, 4)]


def test_packed_examples_become_one_row():
    rows = [example(4, position_ids=torch.tensor([0, 1, 0, 1])), example(2, position_ids=torch.tensor([0, 1]))]
    batch = Collator(0)(rows)
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 0, 1]]
    assert batch["input_ids"].shape == (1, 6) and "attention_mask" not in batch and batch["use_cache"] is False


def test_bad_examples():
    with pytest.raises(ValueError, match="examples: expected at least one"):
        Collator(0)([])
    with pytest.raises(ValueError, match="examples: expected at most max_length=2 tokens, got 3"):
        Collator(0, max_length=2)([example(3)])
