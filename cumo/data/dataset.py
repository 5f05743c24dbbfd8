# SPDX-License-Identifier: Apache-2.0
"""Conversations with pictures, read row by row from files of any size."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cumo.data.encoding import SampleEncoder
from cumo.data.formats import Sample
from cumo.data.pictures import open_picture
from cumo.data.pixels import PixelReader
from cumo.data.rows import RowIndex
from cumo.data.sources import DataSource
from cumo.data.yaml_text import shown
from cumo.models.prompts import IGNORE_INDEX, Encoded, Template

logger = logging.getLogger(__name__)

ON_BAD_SAMPLE = ("stop", "skip")
IMAGE_ASPECTS = ("pad", "square")

Example = dict[str, Tensor]


class Fault(NamedTuple):
    """Something wrong with a row."""

    file: str
    line: int
    """On which the row begins, from 1; 0 if it is the whole file."""
    row: int
    """Its number in the file, from 1, as a JSON list may stand on one line; 0 if rows cannot be told apart."""
    sample_id: object
    reason: str

    def __str__(self) -> str:
        if not self.line:
            return f"{self.file}: {self.reason}"
        if not self.row:
            return f"{self.file}:{self.line}: {self.reason}"
        return f"{self.file}:{self.line}: row {self.row}, sample {shown(self.sample_id)}: {self.reason}"


class BadSampleError(ValueError):
    """A sample that cannot be trained on; its text is that of `fault`, which gets lost between processes."""

    fault: Fault | None = None


class ConversationDataset(Dataset[Example]):
    """Samples of files, ready for a `Collator`.

    An example has `input_ids` and `labels`, int64 [L], where each picture is `processor.image_seq_length` placeholders
    and what is not trained on has the label -100; with pictures also `pixel_values`, float32 [images, 3, H, H], and
    `pixel_values_large`, [images, 3, s H, s H], if the processor has a `high_resolution_size`. Of its `row`, int64 [1],
    `place` says where it is from, also where a good sample stands in for a bad one.

    All rows are parsed once to find where they lie; what is wrong with their structure is found then. Pictures, and
    what else takes time, are looked at when a sample is asked for; `check_data` looks at everything.

    Args:
        sources: what to train on, one after the other.
        processor: a `CuMoProcessor`.
        template: a template of `cumo.models.prompts` or its name.
        max_length: most tokens of a sample, pictures included.
        on_bad_sample: "stop" raises at a bad sample. "skip" logs each once as a warning and leaves it out; if it shows
            only when it is asked for, a good one stands in for it, always the same, so that batches keep their size.
        image_aspect: "pad" pads pictures to squares, "square" takes their middle square.
        seed: of random sampling, the same in every epoch.
        high_resolution: demand a processor with `high_resolution_size`.
        progress: show a bar while files are read, if they take more than some seconds.

    Raises:
        ValueError: an argument does not fit, a file is missing or empty, or a row is bad and `on_bad_sample` is "stop".
    """

    def __init__(
        self,
        sources: Sequence[DataSource],
        processor: Any,
        template: Template | str = "mistral_instruct_system",
        *,
        max_length: int = 2048,
        on_bad_sample: str = "stop",
        image_aspect: str = "pad",
        seed: int = 0,
        high_resolution: bool = False,
        progress: bool = True,
    ) -> None:
        if not sources:
            raise ValueError("sources: expected at least one, got none")
        for name, value, allowed in (
            ("on_bad_sample", on_bad_sample, ON_BAD_SAMPLE),
            ("image_aspect", image_aspect, IMAGE_ASPECTS),
        ):
            if value not in allowed:
                raise ValueError(f"{name}: expected one of {list(allowed)}, got {value!r}")
        if not isinstance(max_length, int) or max_length < 1:
            raise ValueError(f"max_length: expected a positive integer, got {max_length!r}")
        if high_resolution and processor.high_resolution_size is None:
            raise ValueError("high_resolution: expected False for a processor without high_resolution_size, got True")
        self.sources = list(sources)
        self.processor = processor
        self.encode = SampleEncoder(processor, template)
        self.max_length = max_length
        self.on_bad_sample = on_bad_sample
        self.image_options = {"do_pad": image_aspect == "pad"}
        self.readers = self._readers(image_aspect == "pad")
        self.indices = [
            RowIndex(Path(source.path), self.encode.estimate, source.limit, progress) for source in self.sources
        ]
        first = np.cumsum([0, *map(len, self.indices)])
        selected = [
            first[number] + source.select(len(index), np.random.default_rng([seed, number]))
            for number, (source, index) in enumerate(zip(self.sources, self.indices, strict=True))
        ]
        # Rows are numbered through all sources. Shared memory: what a worker of a DataLoader skips, the others know.
        self._first = first
        self._rows = np.concatenate(selected)
        self._bad = torch.zeros(int(first[-1]), dtype=torch.bool).share_memory_()
        self._leave_out_faults()

    def _leave_out_faults(self) -> None:
        """Of the rows that are to be trained on; the others may be as they like."""
        faulty = [int(self._first[n]) + row for n, index in enumerate(self.indices) for row in sorted(index.faults)]
        faulty = np.array(faulty, dtype=np.int64)[np.isin(faulty, self._rows)].tolist()
        if faulty and self.on_bad_sample == "stop":
            number, row = self._locate(faulty[0])
            more = f" ({len(faulty) - 1} more bad rows)" if len(faulty) > 1 else ""
            raise BadSampleError(f"{self.fault(faulty[0], self.indices[number].faults[row])}{more}")
        for row in faulty:
            number, local = self._locate(row)
            self._skip(row, self.fault(row, self.indices[number].faults[local]))
        self._rows = self._rows[~np.isin(self._rows, faulty)]
        if not len(self._rows):
            raise ValueError("sources: expected at least one good row, got none")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        for place in with_stand_ins(index, len(self)):
            if self._bad[self._rows[place]]:
                continue
            try:
                return self.load(place)
            except BadSampleError as error:
                self.handle_bad(place, error)
        raise ValueError("sources: expected at least one good sample, got none")

    def load(self, index: int) -> Example:
        """A sample, whatever is to be done about bad ones.

        Raises:
            BadSampleError: it is bad.
        """
        row = int(self._rows[index])
        number, local = self._locate(row)
        try:
            sample = self.indices[number].read(local)
            encoded = self._encode(sample)
            example = {"input_ids": torch.tensor(encoded.input_ids), "labels": torch.tensor(encoded.labels)}
            if sample.images:
                example.update(self._pixels(sample, self.sources[number].folder))
            example["row"] = torch.tensor([row])
        except (ValueError, OSError) as error:
            raise self.bad(index, str(error)) from error
        return example

    def token_count(self, index: int) -> int:
        """How many tokens a sample has with its pictures, which are not opened.

        Raises:
            BadSampleError: its text is bad.
        """
        row = int(self._rows[index])
        number, local = self._locate(row)
        try:
            return len(self._encode(self.indices[number].read(local)).input_ids)
        except (ValueError, OSError) as error:
            raise self.bad(index, str(error)) from error

    def bad(self, index: int, reason: str) -> BadSampleError:
        """The error that says so of a sample."""
        fault = self.fault(int(self._rows[index]), reason)
        error = BadSampleError(str(fault))
        error.fault = fault
        return error

    def handle_bad(self, index: int, error: BadSampleError) -> None:
        """Do about a bad sample what is to be done: raise, or log it once.

        Raises:
            BadSampleError: `error`, if `on_bad_sample` is "stop".
        """
        if self.on_bad_sample == "stop":
            raise error
        self._skip(int(self._rows[index]), error)

    def _encode(self, sample: Sample) -> Encoded:
        encoded = self.encode(sample)
        if len(encoded.input_ids) > self.max_length:
            pictures = f" with {len(sample.images)} pictures" if sample.images else ""
            raise ValueError(
                f"expected at most max_length={self.max_length} tokens, got {len(encoded.input_ids)}{pictures}"
            )
        if all(label == IGNORE_INDEX for label in encoded.labels):
            raise ValueError("expected tokens to train on, got none")
        return encoded

    def _readers(self, pad: bool) -> dict[str, PixelReader]:
        """What makes the pixels, by name; empty where the processor has to do it."""
        image_processor, large = self.processor.image_processor, self.processor.high_resolution_size
        if not PixelReader.supports(image_processor):
            return {}
        readers = {"pixel_values": PixelReader(image_processor, pad)}
        if large is not None:
            readers["pixel_values_large"] = PixelReader(image_processor, pad, large)
        return readers

    def _pixels(self, sample: Sample, folder: Path) -> Example:
        pictures = [open_picture(reference, folder) for reference in sample.images]
        if self.readers:
            return {name: reader(pictures) for name, reader in self.readers.items()}
        batch = self.processor(pictures, images_kwargs=self.image_options, return_tensors="pt")
        pixels = {"pixel_values": batch["pixel_values"]}
        if "pixel_values_large" in batch:
            (pixels["pixel_values_large"],) = batch["pixel_values_large"]
        return pixels

    def _locate(self, row: int) -> tuple[int, int]:
        """Number of the source, and of the row within it."""
        number = int(np.searchsorted(self._first, row, side="right")) - 1
        return number, row - int(self._first[number])

    def fault(self, row: int, reason: str) -> Fault:
        """What is wrong with a row, which is numbered through all sources."""
        number, local = self._locate(row)
        index = self.indices[number]
        return Fault(str(index.path), int(index.lines[local]), local + 1, index.sample_id(local), reason)

    def place(self, row: int) -> str:
        """Where the sample of an example's `row` is from: file, line and id."""
        return str(self.fault(row, "")).removesuffix(": ")

    def _skip(self, row: int, reason: object) -> None:
        if not self._bad[row]:
            self._bad[row] = True
            logger.warning("skipped %s", reason)

    def _per_sample(self, name: str) -> np.ndarray[Any, Any]:
        column = np.concatenate([getattr(index, name) for index in self.indices])
        return column[self._rows]

    @property
    def lengths(self) -> list[int]:
        """About how many tokens each sample has with its pictures, from the number of characters."""
        return self._per_sample("lengths").tolist()

    @property
    def has_image(self) -> list[bool]:
        """Whether each sample has pictures."""
        return (self._per_sample("image_counts") > 0).tolist()

    @property
    def image_counts(self) -> list[int]:
        """How many pictures each sample has."""
        return self._per_sample("image_counts").tolist()

    @property
    def skipped(self) -> list[str]:
        """Rows left out so far, by any worker, as file:line; the log has their reasons."""
        rows = torch.nonzero(self._bad).flatten().tolist()
        places = [self._locate(row) for row in rows]
        return [f"{self.indices[number].path}:{self.indices[number].lines[row]}" for number, row in places]


def with_stand_ins(index: int, size: int) -> Iterator[int]:
    """The place asked for, then all others in a fixed order in which the stand-ins of neighbours lie far apart.

    Raises:
        IndexError: there is no such place.
    """
    if not -size <= index < size:
        raise IndexError(f"index: expected less than {size}, got {index}")
    stride = _coprime_near(0.618 * size, size)
    return ((index + step * stride) % size for step in range(size))


def _coprime_near(value: float, size: int) -> int:
    """A step that reaches every one of `size` places, and takes the neighbours of a place far apart."""
    step = max(1, round(value))
    while math.gcd(step, size) != 1:
        step += 1
    return step
