# SPDX-License-Identifier: Apache-2.0
"""Ids and labels of samples. Control tokens in a sample's text are told apart from the template's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from cumo.data.formats import Sample
from cumo.models.prompts import IGNORE_INDEX, Encoded, Segment, Template, encode, get_template, render
from cumo.models.tokenizer import IMAGE_TOKEN

BYTES_PER_TOKEN = 4  # English with Mistral's tokenizer has 3.9 to 4.3, other languages have 2 to 4
NONCHARACTERS = range(0xFDD0, 0xFDF0)  # reserved by Unicode for use within a program


class SampleEncoder:
    """Encodes samples like `cumo.models.prompts.encode_sample`, and expands their placeholders.

    It differs from the published code in one respect: a control token in the text of a sample (`</s>`, as in a page of
    HTML) is tokenised as text. The published code ended the sequence there, in the middle of a question.

    Args:
        processor: a `CuMoProcessor`.
        template: a template of `cumo.models.prompts` or its name.
    """

    def __init__(self, processor: Any, template: Template | str) -> None:
        self.tokenizer = processor.tokenizer
        self.template = get_template(template).with_tokens(self.tokenizer)
        self.image_token_id = processor.image_token_id
        self.image_seq_length = processor.image_seq_length
        added = self.tokenizer.added_tokens_decoder.values()
        control = sorted(token.content for token in added if token.special and token.content != IMAGE_TOKEN)
        self.control = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or r"(?!)")
        initials = sorted({token[0] for token in control})
        if len(initials) > len(NONCHARACTERS):
            raise ValueError(f"tokenizer: expected control tokens of at most 32 first letters, got {len(initials)}")
        self.marks = dict(zip(initials, map(chr, NONCHARACTERS), strict=False))
        self.letters = {ord(mark): letter for letter, mark in self.marks.items()}

    def segments(self, sample: Sample) -> list[Segment]:
        """Return the segments that `render` makes of a sample."""
        return render(self.template, sample.turns, system=sample.system, sample=sample.id)

    def estimate(self, sample: Sample) -> int:
        """Estimate the number of tokens of a sample, pictures included, in microseconds."""
        size = sum(len(segment.text.encode("utf-8", "replace")) for segment in self.segments(sample))
        return 1 + size // BYTES_PER_TOKEN + len(sample.images) * self.image_seq_length

    def __call__(self, sample: Sample) -> Encoded:
        """Return ids and labels. Each picture is `image_seq_length` placeholders, which are never trained on."""
        segments = self.segments(sample)
        # JSON can hold a lone surrogate, UTF-8 cannot: it becomes a question mark
        segments = [segment._replace(text=_encodable(segment.text)) for segment in segments]
        if any(self.control.search(text) for text in _texts(sample)):
            tokenizer: Any = _LiteralTokenizer(self)
            marked = sample._replace(
                turns=[{**turn, "value": self._mark(turn["value"])} for turn in sample.turns],
                system=None if sample.system is None else self._mark(sample.system),
            )
            segments = [segment._replace(text=_encodable(segment.text)) for segment in self.segments(marked)]
        else:
            tokenizer = self.tokenizer
        return self._expand(encode(tokenizer, segments, self.image_token_id))

    def _mark(self, text: str) -> str:
        """Replace the first letter of each control token, so that none is left. The length stays the same."""
        text = text.translate(dict.fromkeys(self.letters, "\ufffd"))
        return self.control.sub(lambda match: self.marks[match[0][0]] + match[0][1:], text)

    def _expand(self, encoded: Encoded) -> Encoded:
        input_ids: list[int] = []
        labels: list[int] = []
        begin = 0
        for _ in range(encoded.input_ids.count(self.image_token_id)):
            at = encoded.input_ids.index(self.image_token_id, begin)
            input_ids += encoded.input_ids[begin:at] + [self.image_token_id] * self.image_seq_length
            labels += encoded.labels[begin:at] + [IGNORE_INDEX] * self.image_seq_length
            begin = at + 1
        return Encoded(input_ids + encoded.input_ids[begin:], labels + encoded.labels[begin:])


def _texts(sample: Sample) -> list[str]:
    return [turn["value"] for turn in sample.turns] + ([] if sample.system is None else [sample.system])


def _encodable(text: str) -> str:
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


class _LiteralTokenizer:
    """Tokeniser wrapper: control tokens it finds are the template's, and what `SampleEncoder` marked is text."""

    def __init__(self, encoder: SampleEncoder) -> None:
        self.encoder = encoder
        self.bos_token_id = encoder.tokenizer.bos_token_id

    def __call__(self, text: str, **options: Any) -> dict[str, Sequence[Any]]:
        tokenizer = self.encoder.tokenizer
        input_ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        begin = 0
        for control in [*self.encoder.control.finditer(text), None]:
            end = len(text) if control is None else control.start()
            if end > begin:
                piece = text[begin:end].translate(self.encoder.letters)
                encoding = tokenizer(piece, split_special_tokens=True, **options)
                input_ids += encoding["input_ids"]
                offsets += [(begin + first, begin + last) for first, last in encoding["offset_mapping"]]
            if control is not None:
                input_ids.append(tokenizer.convert_tokens_to_ids(control[0]))
                offsets.append(control.span())
                begin = control.end()
        return {"input_ids": input_ids, "offset_mapping": offsets}
