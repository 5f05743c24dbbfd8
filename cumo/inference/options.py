# SPDX-License-Identifier: Apache-2.0
"""Options of an answer, and the answer itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "cancelled"]
MAX_STOPS = 16
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class GenerationOptions:
    """Options for answering one conversation. Rows of a batch may have different ones.

    Args:
        max_new_tokens: largest number of tokens of the answer.
        temperature: 0 for greedy decoding; otherwise the logits are divided by it before a token is drawn.
        top_p: draw from the smallest set of most probable tokens whose probabilities sum to this.
        stop: string or strings before which the answer ends; they are not part of it.
        seed: seed of the draws. With the same seed, the same conversation gets the same answer, whatever else is in the
            batch. None draws differently each time.

    Raises:
        ValueError: a value is out of range or of the wrong type.

    Examples:
        >>> from cumo.inference import GenerationOptions
        >>> GenerationOptions(max_new_tokens=64, temperature=0.7, stop="\\n\\n").stop
        ('\\n\\n',)
        >>> GenerationOptions(temperature=-1)
        Traceback (most recent call last):
        ValueError: temperature: expected a number from 0 to 100, got -1
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    stop: str | Sequence[str] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        """Validate the values; `stop` becomes a tuple."""
        if not _is_integer(self.max_new_tokens) or self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected a positive integer, got {self.max_new_tokens!r}")
        if not _is_number(self.temperature) or not 0 <= self.temperature <= 100:
            raise ValueError(f"temperature: expected a number from 0 to 100, got {self.temperature!r}")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number above 0 and up to 1, got {self.top_p!r}")
        if self.seed is not None and (not _is_integer(self.seed) or abs(self.seed) > MAX_SEED):
            raise ValueError(f"seed: expected an integer of 64 bits or None, got {self.seed!r}")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Sequence) or not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop: expected strings that are not empty, got {self.stop!r}")
        if len(stop) > MAX_STOPS:
            raise ValueError(f"stop: expected up to {MAX_STOPS} strings, got {len(stop)}")
        object.__setattr__(self, "stop", tuple(stop))


class Completion(NamedTuple):
    """An answer and why it ended."""

    text: str
    """Text of the answer, without the stop string and without surrounding white space."""
    finish_reason: FinishReason
    """"stop": the model ended its answer, or a stop string occurred; "length": a limit was reached; "cancelled"."""
    prompt_tokens: int
    """Number of tokens in the whole prompt, the placeholders of pictures included."""
    completion_tokens: int
    """Number of generated tokens, including the one that ended the answer."""


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
