# SPDX-License-Identifier: Apache-2.0
"""Order of samples: batches of one modality and of similar lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler

POOL = 50  # batches that are sorted by length together, as in transformers, whose code says it keeps enough randomness


class ModalityLengthSampler(Sampler[int]):
    """Yields every index once. Each run of `batch_size` has only pictures or only text, and similar lengths.

    The order depends only on `seed` and `epoch`: each process computes the same, and accelerate distributes it. The
    incomplete batches of both modalities come last, the one with pictures first. The longest batch with pictures comes
    first, so that too little memory shows at once.

    Args:
        lengths: approximate number of tokens of each sample.
        has_image: whether each sample has pictures.
        batch_size: batch size of one optimiser step, over all processes and accumulation steps.
        seed: seed of the order.
        epoch: epoch whose order to use; see `set_epoch`.

    Raises:
        ValueError: `lengths` and `has_image` differ in length, or `batch_size` is not positive.
    """

    def __init__(
        self, lengths: Sequence[int], has_image: Sequence[bool], batch_size: int, *, seed: int = 0, epoch: int = 0
    ) -> None:
        if len(lengths) != len(has_image):
            raise ValueError(f"has_image: expected {len(lengths)}, as many as lengths, got {len(has_image)}")
        if batch_size < 1:
            raise ValueError(f"batch_size: expected a positive integer, got {batch_size}")
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.has_image = np.asarray(has_image, dtype=bool)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = epoch

    def set_epoch(self, epoch: int) -> None:
        """Use the order of another epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        batches, left = [], []
        for with_image in (True, False):
            whole, rest = self._batches(np.flatnonzero(self.has_image == with_image), rng)
            batches += whole
            left.append(rest)
        order = [batches[index] for index in rng.permutation(len(batches))]
        pictures = [index for index, batch in enumerate(order) if self.has_image[batch[0]]]
        if pictures:
            longest = max(pictures, key=lambda index: self.lengths[order[index]].sum())
            order[0], order[longest] = order[longest], order[0]
        return iter(np.concatenate([*order, *left]).astype(np.int64).tolist())

    def _batches(self, members: Any, rng: np.random.Generator) -> tuple[list[Any], Any]:
        """Return full batches of similar lengths, and the remaining indices."""
        members = rng.permutation(members)
        whole = len(members) // self.batch_size * self.batch_size
        batches = []
        for begin in range(0, whole, self.batch_size * POOL):
            pool = members[begin : min(begin + self.batch_size * POOL, whole)]
            pool = pool[np.argsort(-self.lengths[pool], kind="stable")]
            batches += np.split(pool, len(pool) // self.batch_size)
        return batches, members[whole:]
