# SPDX-License-Identifier: Apache-2.0
"""A plain loop for the two models that the demo would otherwise download; CuMo itself trains in `cumo.train`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

MOST_THREADS = 4  # more of them wait for one another: the matrices are small
WARMUP = 0.1  # share of the steps
LINE_SECONDS = 15.0


def device() -> torch.device:
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def few_threads() -> Iterator[None]:
    """Limit PyTorch to `MOST_THREADS` threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, MOST_THREADS))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def optimise(model: nn.Module, loss_of: Callable[[], Tensor], steps: int, lr: float, title: str) -> float:
    """Train with AdamW, a linear warm-up and a cosine; the mean loss of the last tenth of the steps.

    Args:
        model: in place.
        loss_of: the loss of a new batch.
        steps: of the optimizer.
        lr: the highest learning rate.
        title: what the progress is called.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=WARMUP)
    losses: list[float] = []
    last_line = -LINE_SECONDS
    with tqdm(total=steps, desc=title, unit="step", disable=not sys.stderr.isatty()) as bar:
        for step in range(1, steps + 1):
            loss = loss_of()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
            if bar.disable and (time.monotonic() - last_line >= LINE_SECONDS or step == steps):
                last_line = time.monotonic()
                print(f"{title}: step {step} of {steps}, loss {losses[-1]:.4f}", file=sys.stderr, flush=True)
    model.eval()
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)
