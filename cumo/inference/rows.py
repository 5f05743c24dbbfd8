# SPDX-License-Identifier: Apache-2.0
"""Rows of a batch, each with its own options, in one `generate` of transformers.

Letters: B rows, V vocabulary, L tokens generated so far.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from cumo.inference.features import PreparedPicture
from cumo.inference.options import Completion, FinishReason, GenerationOptions
from cumo.inference.text_stream import TextStream

COLDEST = 1e-6  # a lower temperature would be rounded to 0


class Row:
    """An answer that is being generated.

    Args:
        prompt_ids: ids of the whole prompt.
        pictures: pictures of the prompt, in order.
        options: options of the answer.
        tokenizer: tokenizer that decodes the answer.
        on_text: called with each piece of text, in the thread that generates.
        on_end: called in the same thread once the answer has ended.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        pictures: Sequence[PreparedPicture],
        options: GenerationOptions,
        tokenizer: Any,
        on_text: Callable[[str], None] | None = None,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        self.prompt_ids = prompt_ids
        self.pictures = pictures
        self.options = options
        self.max_new_tokens = options.max_new_tokens
        self.tokens = 0
        self.finish_reason: FinishReason | None = None
        self._on_text = on_text
        self._on_end = on_end
        self._stream = TextStream(tokenizer, options.stop)
        self._cancelled = threading.Event()
        self._seed = secrets.randbits(63) if options.seed is None else options.seed
        self._draws = torch.Generator()
        self.restart()

    def cancel(self) -> None:
        """End the answer at the next token. May be called from any thread."""
        self._cancelled.set()

    def restart(self) -> None:
        """Restart the random draws. Only for a row that has no token yet."""
        assert self.tokens == 0
        self._draws.manual_seed(self._seed)

    def end_cancelled(self) -> None:
        """End a row that was cancelled before it ran."""
        self._finish("cancelled")

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled.is_set()

    def draw(self) -> float:
        """Return the next random number in [0, 1). One is drawn for each sampled token."""
        return float(torch.rand((), generator=self._draws, dtype=torch.float64))

    def push(self, token: int, eos_ids: frozenset[int]) -> None:
        """Add the next token, and end the row if the token, a stop string or a limit asks for it."""
        self.tokens += 1
        if self.is_cancelled:
            return self._finish("cancelled")
        if token in eos_ids:
            return self._finish("stop")
        self._say(self._stream.push(token))
        if self._stream.stopped:
            return self._finish("stop")
        if self.tokens >= self.max_new_tokens:
            return self._finish("length")
        return None

    def completion(self) -> Completion:
        """Return the answer, once it has ended."""
        assert self.finish_reason is not None
        return Completion(self._stream.text, self.finish_reason, len(self.prompt_ids), self.tokens)

    def _finish(self, reason: FinishReason) -> None:
        if reason != "cancelled":
            self._say(self._stream.finish())
        # the text held back may have completed a stop string
        self.finish_reason = "stop" if reason == "length" and self._stream.stopped else reason
        if self._on_end is not None:
            self._on_end()

    def _say(self, piece: str) -> None:
        if piece and self._on_text is not None:
            self._on_text(piece)


class RowSampler(LogitsProcessor):
    """Draws each row's token with the row's own options and random numbers, so that other rows have no influence.

    Leaves 0 at the chosen token and -inf elsewhere; rows of temperature 0 stay unchanged. The caller decodes
    greedily.

    Args:
        rows: the B rows of the batch.
        suppressed: ids that are never chosen.
    """

    def __init__(self, rows: Sequence[Row], suppressed: Sequence[int] = ()) -> None:
        self._rows = rows
        self._suppressed = list(suppressed)
        self._sampled = [index for index, row in enumerate(rows) if row.options.temperature > 0]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002
        """Map scores [B, V] to scores [B, V]."""
        if self._suppressed:
            scores[:, self._suppressed] = -torch.inf
        if not self._sampled:
            return scores
        rows = [self._rows[index] for index in self._sampled]
        options = torch.tensor([[max(row.options.temperature, COLDEST), row.options.top_p, row.draw()] for row in rows])
        temperature, top_p, draw = options.to(scores.device).split(1, dim=1)
        logits = scores[self._sampled].float()
        # relative to the largest logit, which stays finite after any division
        chosen = choose((logits - logits.amax(dim=-1, keepdim=True)) / temperature, top_p, draw)
        scores[self._sampled] = torch.full_like(scores[self._sampled], -torch.inf).scatter_(1, chosen, 0.0)
        return scores


def choose(logits: Tensor, top_p: Tensor, draw: Tensor) -> Tensor:
    """Draw tokens by the inverse distribution function: logits [B, V], top_p and draw [B, 1] in [0, 1) -> ids [B, 1].

    Tokens are kept by falling probability until their sum reaches `top_p`; `draw` is a share of that sum.
    """
    probs, ids = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    sums = probs.cumsum(dim=-1)
    kept = sums - probs < top_p
    kept[:, 0] = True  # even if `top_p` is rounded to 0
    total = torch.where(kept, sums, 0.0).amax(dim=-1, keepdim=True)
    place = (sums <= draw * total).sum(dim=-1, keepdim=True)
    return ids.gather(1, torch.minimum(place, kept.sum(dim=-1, keepdim=True) - 1))


class RowStopping(StoppingCriteria):
    """Gives each row its newest token, and stops the rows that have ended.

    Args:
        rows: the B rows of the batch.
        eos_ids: ids of the tokens that end an answer.
    """

    def __init__(self, rows: Sequence[Row], eos_ids: frozenset[int]) -> None:
        self._rows = rows
        self._eos_ids = eos_ids

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # noqa: ARG002
        """Map ids [B, L] to [B], True for rows that have ended."""
        for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            if row.finish_reason is None:
                row.push(token, self._eos_ids)
        ended = [row.finish_reason is not None for row in self._rows]
        return torch.tensor(ended, device=input_ids.device)
