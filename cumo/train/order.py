# SPDX-License-Identifier: Apache-2.0
"""The order of samples over all epochs, as one stream of whole batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Sampler

from cumo.data import ModalityLengthSampler


class EpochSampler(Protocol):
    """Every index once, in an order that depends on the epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the order."""

    def __iter__(self) -> Iterator[int]:
        """The indices."""

    def __len__(self) -> int:
        """How many."""


class Shuffle(Sampler[int]):
    """Every index once, in an order that depends on seed and epoch alone."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.default_rng([self.seed, self.epoch]).permutation(self.size).tolist())


class Stream(Sampler[int]):
    """The indices of `steps` batches, epoch after epoch.

    The last batch of an epoch is filled up from the epoch's beginning, so that each batch is whole whatever the number
    of processes it is dealt out to. As there is one stream for the whole training, going on from a step means to skip
    what comes before, and nothing else.

    Args:
        epochs: the order of each epoch.
        batch_size: samples of a step over all processes.
        steps: of the optimizer, in all.
    """

    def __init__(self, epochs: EpochSampler, batch_size: int, steps: int) -> None:
        self.epochs, self.batch_size, self.steps = epochs, batch_size, steps

    def __len__(self) -> int:
        return self.steps * self.batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every sample is seen."""
        return steps_per_epoch(len(self.epochs), self.batch_size)

    def __iter__(self) -> Iterator[int]:
        left = len(self)
        per_epoch = self.steps_per_epoch * self.batch_size
        for epoch in range(math.ceil(left / per_epoch)):
            self.epochs.set_epoch(epoch)
            order = np.resize(np.fromiter(self.epochs, dtype=np.int64), per_epoch)
            yield from order[:left].tolist()
            left -= per_epoch


def steps_per_epoch(samples: int, batch_size: int) -> int:
    """Whole batches in which every sample is seen."""
    return math.ceil(samples / batch_size)


def stream_of(dataset: Any, batch_size: int, steps: int, *, grouped: bool, seed: int) -> Stream:
    """The stream of a `ConversationDataset` or `PackedDataset`.

    Args:
        dataset: what the indices are of.
        batch_size, steps: of the optimizer.
        grouped: batches of one modality and similar lengths.
        seed: of the order.
    """
    epochs: EpochSampler = Shuffle(len(dataset), seed)
    if grouped:
        epochs = ModalityLengthSampler(dataset.lengths, dataset.has_image, batch_size, seed=seed)
    return Stream(epochs, batch_size, steps)
