# SPDX-License-Identifier: Apache-2.0
"""Data parallelism: each process of `torchrun` answers its share of the questions, files bring the answers together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

_PATIENCE = timedelta(days=7)  # a share may take hours longer than another, and a judge as well


def _alone() -> None:
    """Nobody to wait for."""


@dataclass(frozen=True)
class Worker:
    """One of `world_size` processes."""

    rank: int = 0
    world_size: int = 1
    barrier: Callable[[], object] = _alone
    """Returns once every process has called it."""


@contextmanager
def joined() -> Iterator[Worker]:
    """This process among those that `torchrun` started, or alone."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Worker()
        return
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Worker(dist.get_rank(), world_size, dist.barrier)
    finally:
        dist.destroy_process_group()
