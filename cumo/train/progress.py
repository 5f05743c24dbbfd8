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
        self.terminal = sys.stderr.isatty()
        self.last_line = -LINE_SECONDS
        self.numbers: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Open the bar."""
        if self.shown and self.terminal:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.title, unit="step")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        """Take the numbers to show."""
        if logs and "loss" in logs:
            rates = [value for name, value in logs.items() if name.startswith("lr/")]
            self.numbers = {"loss": f"{logs['loss']:.4f}", "lr": f"{max(rates, default=0.0):.1e}"}
            if "tokens/s" in logs:
                self.numbers["tokens/s"] = f"{logs['tokens/s']:.0f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Move on."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)
            self.bar.set_postfix(self.numbers, refresh=False)
        elif self.shown and not self.terminal:
            now = time.monotonic()
            if now - self.last_line >= LINE_SECONDS or state.global_step == state.max_steps:
                self.last_line = now
                told = ", ".join(f"{name} {value}" for name, value in self.numbers.items())
                print(f"{self.title}: step {state.global_step} of {state.max_steps}, {told}", file=sys.stderr)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
