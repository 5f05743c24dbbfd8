# SPDX-License-Identifier: Apache-2.0
"""Turn tokens into text, piece by piece, without partial characters, and end before a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

INCOMPLETE = "\ufffd"  # a tokenizer's output for bytes that are not a whole character


class TextStream:
    """The text of tokens that arrive one by one.

    The pieces add up to the text. White space around the text is left out, so white space is held back until something
    follows it; so is text that may turn out to begin a stop string.

    Args:
        tokenizer: tokenizer that decodes; special tokens are left out.
        stop: strings before which the text ends.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        # Of the tokens, those before `_context` are not needed any more, and those before `_decoded` are in `_text`:
        # what further tokens add is the difference of two decodings, since a decoder looks at a token's neighbours.
        self._context = 0
        self._decoded = 0
        self._text = ""
        self._given = 0

    @property
    def text(self) -> str:
        """Concatenation of all pieces so far."""
        return self._text[: self._given].lstrip()

    def push(self, token: int) -> str:
        """Add a token. Return the text that is certain now, possibly none."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        known = self._decode(self._context, self._decoded)
        text = self._decode(self._context, len(self._tokens))
        if len(text) <= len(known) or text.endswith(INCOMPLETE):
            return ""
        self._context, self._decoded = self._decoded, len(self._tokens)
        self._append(text[len(known) :])
        return self._give(self._held())

    def finish(self) -> str:
        """Return the rest of the text, after the last token."""
        if not self.stopped:
            known = self._decode(self._context, self._decoded)
            self._append(self._decode(self._context, len(self._tokens))[len(known) :])
            self._decoded = len(self._tokens)
        return self._give(0)

    def _decode(self, begin: int, end: int) -> str:
        return str(self._tokenizer.decode(self._tokens[begin:end], skip_special_tokens=True))

    def _append(self, text: str) -> None:
        longest = max(map(len, self._stop), default=1)
        begin = max(0, len(self._text) - longest + 1)
        self._text += text
        found = [place for stop in self._stop if (place := self._text.find(stop, begin)) >= 0]
        if found:
            self._text = self._text[: min(found)]
            self.stopped = True

    def _held(self) -> int:
        """Return the number of characters at the end that may begin a stop string."""
        if self.stopped:
            return 0
        longest = max(map(len, self._stop), default=1) - 1
        for size in range(min(longest, len(self._text)), 0, -1):
            if any(stop.startswith(self._text[-size:]) for stop in self._stop):
                return size
        return 0

    def _give(self, held: int) -> str:
        end = len(self._text[: len(self._text) - held].rstrip())
        if end <= self._given:
            return ""
        piece = self._text[self._given : end]
        if not self._given:
            piece = piece.lstrip()
        self._given = end
        return piece
