# SPDX-License-Identifier: Apache-2.0
"""Pack several samples into one row, so that little is computed on padding. Each sample attends only to itself."""

from __future__ import annotations

import logging
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from cumo.data.dataset import BadSampleError, ConversationDataset, Example, with_stand_ins

logger = logging.getLogger(__name__)

POOL = 8192  # samples packed together; more fill rows hardly better, and mix long and short less randomly
COUNT_BATCH = 64


def plan_rows(
    lengths: Sequence[int],
    images: Sequence[int],
    max_length: int,
    max_images: int | None,
    rng: np.random.Generator,
) -> list[list[int]]:
    """Assign samples to rows: best fit by decreasing length, within random pools.

    Args:
        lengths: tokens of each sample; samples of length 0 are left out.
        images: number of pictures of each sample.
        max_length: largest number of tokens of a row.
        max_images: largest number of pictures of a row; None for no limit.
        rng: random generator that shuffles the samples.

    Returns:
        Indices of the samples of each row, in random order.
    """
    order = rng.permutation(np.flatnonzero(np.asarray(lengths)))
    limit = max_images if max_images is not None else sum(images)
    rows: list[list[int]] = []
    for begin in range(0, len(order), POOL):
        pool = sorted(order[begin : begin + POOL].tolist(), key=lambda index: -lengths[index])
        room: list[tuple[int, int, int]] = []  # tokens and pictures that still fit, and the row; sorted
        for index in pool:
            fitting = (
                at for at in range(bisect_left(room, (lengths[index],)), len(room)) if room[at][1] >= images[index]
            )
            at = next(fitting, None)
            if at is None:
                tokens, pictures, row = max_length, limit, len(rows)
                rows.append([])
            else:
                tokens, pictures, row = room.pop(at)
            rows[row].append(index)
            insort(room, (tokens - lengths[index], pictures - images[index], row))
    return [rng.permutation(row).tolist() for row in rows]


class PackedDataset(Dataset[Example]):
    """Rows of several samples of a `ConversationDataset`.

    A row is an example with `position_ids`, int64 [L], which restart at each sample. The `Collator` makes a batch of it
    in which attention is block-diagonal. Samples are neither cut nor left out. All texts are tokenised once to plan the
    rows, which takes minutes for a million samples; pictures are not opened for it. The plan depends only on samples
    and seed.

    Args:
        dataset: the samples. Its `max_length` must not exceed this one. Its `on_bad_sample` applies here too: "skip"
            leaves a bad sample out of its row.
        max_length: largest number of tokens of a row.
        max_images: largest number of pictures of a row; None for no limit. It bounds the memory that the encoder needs.
        seed: seed of the plan.
        workers: number of processes that tokenise.
        progress: whether to show a bar meanwhile.

    Raises:
        ValueError: an argument is invalid, or a sample is bad and the dataset's `on_bad_sample` is "stop".
    """

    def __init__(
        self,
        dataset: ConversationDataset,
        max_length: int,
        max_images: int | None = None,
        seed: int = 0,
        *,
        workers: int = 0,
        progress: bool = True,
    ) -> None:
        if max_length < dataset.max_length:
            raise ValueError(f"max_length: expected at least the {dataset.max_length} of the samples, got {max_length}")
        if max_images is not None and max_images < 1:
            raise ValueError(f"max_images: expected a positive integer, got {max_images}")
        self.dataset = dataset
        self.max_length = max_length
        self._images = dataset.image_counts
        self._lengths = self._count(max_images, workers, progress)
        self.rows = plan_rows(self._lengths, self._images, max_length, max_images, np.random.default_rng(seed))
        if not self.rows:
            raise ValueError("dataset: expected at least one good sample, got none")
        self.fill = sum(self.lengths) / (len(self.rows) * max_length)
        samples = sum(map(len, self.rows))
        logger.info("%d samples packed into %d rows, %.1f %% full", samples, len(self.rows), 100 * self.fill)

    def _count(self, max_images: int | None, workers: int, progress: bool) -> list[int]:
        """Return the number of tokens of each sample; 0 for a bad one that is to be skipped."""
        loader = DataLoader(_Counts(self.dataset, max_images), COUNT_BATCH, num_workers=workers, collate_fn=list)
        lengths: list[int] = []
        with tqdm(total=len(self.dataset), desc="packing", delay=3.0, disable=None if progress else True) as bar:
            for batch in loader:
                for length, error in batch:
                    if error is not None:
                        self.dataset.handle_bad(len(lengths), error)
                    lengths.append(length)
                bar.update(len(batch))
        return lengths

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        for place in with_stand_ins(index, len(self)):
            examples = self._load(self.rows[place])
            if examples:
                return self._join(examples)
        raise ValueError("dataset: expected at least one good sample, got none")

    def _load(self, members: list[int]) -> list[Example]:
        examples = []
        for member in members:
            try:
                examples.append(self.dataset.load(member))
            except BadSampleError as error:
                self.dataset.handle_bad(member, error)
        return examples

    def _join(self, examples: list[Example]) -> Example:
        """Join samples into one row, and concatenate all that each has."""
        for example in examples:
            example["position_ids"] = torch.arange(len(example["input_ids"]))
        names = dict.fromkeys(name for example in examples for name in example)
        row = {name: torch.cat([example[name] for example in examples if name in example]) for name in names}
        if len(row["input_ids"]) > self.max_length:
            raise ValueError(
                f"max_length: expected at most {self.max_length} tokens, got {len(row['input_ids'])}: data files were "
                "changed since the rows were planned"
            )
        return row

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each row."""
        return [sum(self._lengths[member] for member in row) for row in self.rows]

    @property
    def has_image(self) -> list[bool]:
        """Whether each row has pictures."""
        return [any(self._images[member] for member in row) for row in self.rows]

    @property
    def skipped(self) -> list[str]:
        """Rows that the dataset left out so far; see `ConversationDataset.skipped`."""
        return self.dataset.skipped

    def place(self, row: int) -> str:
        """Return where a sample comes from, given its `row`; see `ConversationDataset.place`."""
        return self.dataset.place(row)


class _Counts(Dataset[tuple[int, Any]]):
    """Number of tokens of each sample, with the error of a bad one."""

    def __init__(self, dataset: ConversationDataset, max_images: int | None) -> None:
        self.dataset, self.max_images = dataset, max_images
        self.images = dataset.image_counts

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, BadSampleError | None]:
        images = self.images[index]
        try:
            if self.max_images is not None and images > self.max_images:
                raise self.dataset.bad(index, f"expected at most max_images={self.max_images} pictures, got {images}")
            return self.dataset.token_count(index), None
        except BadSampleError as error:
            return 0, error
