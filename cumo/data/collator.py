# SPDX-License-Identifier: Apache-2.0
"""Make batches of examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cumo.models.prompts import IGNORE_INDEX


class Collator:
    """Joins examples of a `ConversationDataset` into a batch for the model.

    A batch has `input_ids`, `attention_mask` and `labels`, int64 [B, L], padded on the right as published. With
    pictures it also has `pixel_values`, [images, 3, H, H], of all samples in sequence, and `pixel_values_large`, a
    list of one tensor, where examples have it.

    Examples of a `PackedDataset` become one row, [1, all tokens], with `position_ids` that restart at each sample, and
    without a mask. transformers derives block-diagonal attention from these, in every implementation of attention. It
    is one row because flash attention supports no more.

    Args:
        pad_token_id: id of the padding, which is masked.
        max_length: largest allowed length of a row of the batch; None for no limit.
        rows: whether to add `rows`, int64: the `row` of each sample, which is not for the model.
    """

    def __init__(self, pad_token_id: int, max_length: int | None = None, *, rows: bool = False) -> None:
        self.pad_token_id = pad_token_id
        self.max_length = max_length
        self.rows = rows

    def __call__(self, examples: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        """Return the batch of some examples, which must be all packed or all not.

        Raises:
            ValueError: `examples` is empty, or an example is too long.
        """
        if not examples:
            raise ValueError("examples: expected at least one, got none")
        longest = max(len(example["input_ids"]) for example in examples)
        if self.max_length is not None and longest > self.max_length:
            raise ValueError(f"examples: expected at most max_length={self.max_length} tokens, got {longest}")
        batch: dict[str, Any] = {}
        if "position_ids" in examples[0]:
            for name in ("input_ids", "labels", "position_ids"):
                batch[name] = torch.cat([example[name] for example in examples]).unsqueeze(0)
            batch["use_cache"] = False  # with a cache, transformers does not look for several samples in a row
        else:
            input_ids = [example["input_ids"] for example in examples]
            batch["input_ids"] = pad_sequence(input_ids, batch_first=True, padding_value=self.pad_token_id)
            batch["attention_mask"] = pad_sequence([torch.ones_like(ids) for ids in input_ids], batch_first=True)
            labels = [example["labels"] for example in examples]
            batch["labels"] = pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)
        pixels = [example["pixel_values"] for example in examples if "pixel_values" in example]
        if pixels:
            batch["pixel_values"] = torch.cat(pixels)
        larger = [example["pixel_values_large"] for example in examples if "pixel_values_large" in example]
        if larger:
            batch["pixel_values_large"] = [torch.cat(larger)]
        if self.rows:
            batch["rows"] = torch.cat([example["row"] for example in examples])
        return batch
