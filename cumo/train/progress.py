# SPDX-License-Identifier: Apache-2.0
"""A bar while training runs, and, where no terminal is, a line now and then."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

LINE_SECONDS = 30.0


class Progress(TrainerCallback):
    """Steps, loss, rate and what is left to do.

    Args:
        title: what the bar is called.
        shown: whether this process shows it.
    """

    def __init__(self, title: str, shown: bool = True) -> None:
        self.title, self.shown = title, shown
        self.bar: Any = None
        self.last_line = -LINE_SECONDS

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Open the bar."""
        if self.shown and sys.stderr.isatty():
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.title, unit="step")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        """Show the numbers; without a terminal, every half minute."""
        if not logs or "loss" not in logs:
            return
        rates = [value for name, value in logs.items() if name.startswith("lr/")]
        numbers = {
            "loss": f"{logs['loss']:.4f}",
            "lr": f"{max(rates, default=0.0):.1e}",
            "tokens/s": f"{logs.get('tokens/s', 0.0):.0f}",
        }
        now = time.monotonic()
        if self.bar is not None:
            self.bar.set_postfix(numbers, refresh=False)
        elif self.shown and (now - self.last_line >= LINE_SECONDS or state.global_step == state.max_steps):
            self.last_line = now
            told = ", ".join(f"{name} {value}" for name, value in numbers.items())
            print(f"{self.title}: step {state.global_step} of {state.max_steps}, {told}", file=sys.stderr, flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Move on."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
