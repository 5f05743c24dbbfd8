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
    """A fault of one row, or of a whole file."""

    file: str
    line: int
    """Line on which the row begins, from 1; 0 if the fault concerns the whole file."""
    row: int
    """Number of the row in the file, from 1, as a JSON list may be on one line; 0 if rows cannot be told apart."""
    sample_id: object
    reason: str

    def __str__(self) -> str:
        if not self.line:
            return f"{self.file}: {self.reason}"
        if not self.row:
            return f"{self.file}:{self.line}: {self.reason}"
        return f"{self.file}:{self.line}: row {self.row}, sample {shown(self.sample_id)}: {self.reason}"


class BadSampleError(ValueError):
    """A sample that cannot be trained on. Its text is that of `fault`, an attribute that is lost between processes."""

    fault: Fault | None = None


class ConversationDataset(Dataset[Example]):
    """Samples from files, ready for a `Collator`.

    An example has `input_ids` and `labels`, int64 [L]. Each picture is `processor.image_seq_length` placeholders, and
    tokens that are not trained on have the label -100. With pictures it also has `pixel_values`, float32
    [images, 3, H, H], and `pixel_values_large`, [images, 3, s H, s H], if the processor has a `high_resolution_size`.
    Its `row`, int64 [1], tells `place` where the sample comes from, also if it stands in for a bad one.

    The constructor parses all rows once, to find where they lie and what is wrong with their structure. Pictures and
    other slow parts are checked when a sample is read; `check_data` checks everything.

    Args:
        sources: files to train on, in this order.
        processor: a `CuMoProcessor`.
        template: a template of `cumo.models.prompts` or its name.
        max_length: largest number of tokens of a sample, pictures included.
        on_bad_sample: "stop" raises at a bad sample. "skip" logs each once as a warning and leaves it out. If it turns
            out bad only when it is read, a good one stands in, always the same, so that batches keep their size.
        image_aspect: "pad" pads pictures to squares, "square" crops their centre.
        seed: seed of random sampling, which is the same in every epoch.
        high_resolution: whether the processor must have a `high_resolution_size`.
        progress: whether to show a bar while files are read, if that takes more than some seconds.

    Raises:
        ValueError: an argument is invalid, a file is missing or empty, or a row is bad and `on_bad_sample` is "stop".
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
        """Leave out the faulty rows among those to train on; faults of other rows do not matter."""
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
        """Return a sample, or raise if it is bad, whatever `on_bad_sample` is.

        Raises:
            BadSampleError: the sample is bad.
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
        """Return the number of a sample's tokens, pictures included, without opening the pictures.

        Raises:
            BadSampleError: the text of the sample is bad.
        """
        row = int(self._rows[index])
        number, local = self._locate(row)
        try:
            return len(self._encode(self.indices[number].read(local)).input_ids)
        except (ValueError, OSError) as error:
            raise self.bad(index, str(error)) from error

    def bad(self, index: int, reason: str) -> BadSampleError:
        """Return the error that describes a bad sample."""
        fault = self.fault(int(self._rows[index]), reason)
        error = BadSampleError(str(fault))
        error.fault = fault
        return error

    def handle_bad(self, index: int, error: BadSampleError) -> None:
        """Treat a bad sample as `on_bad_sample` says: raise, or log it once.

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
        """Return the readers of the pixels, by name; none if the processor has to make the pixels."""
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
        """Return the number of the source, and the number of the row within it."""
        number = int(np.searchsorted(self._first, row, side="right")) - 1
        return number, row - int(self._first[number])

    def fault(self, row: int, reason: str) -> Fault:
        """Return the fault of a row; rows are numbered through all sources."""
        number, local = self._locate(row)
        index = self.indices[number]
        return Fault(str(index.path), int(index.lines[local]), local + 1, index.sample_id(local), reason)

    def place(self, row: int) -> str:
        """Return where the sample of an example's `row` comes from: file, line and id."""
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
        """Approximate number of tokens of each sample, pictures included, from its number of characters."""
        return self._per_sample("lengths").tolist()

    @property
    def has_image(self) -> list[bool]:
        """Whether each sample has pictures."""
        return (self._per_sample("image_counts") > 0).tolist()

    @property
    def image_counts(self) -> list[int]:
        """Number of pictures in each sample."""
        return self._per_sample("image_counts").tolist()

    @property
    def skipped(self) -> list[str]:
        """Rows left out so far by any worker, as file:line. The log has the reasons."""
        rows = torch.nonzero(self._bad).flatten().tolist()
        places = [self._locate(row) for row in rows]
        return [f"{self.indices[number].path}:{self.indices[number].lines[row]}" for number, row in places]


def with_stand_ins(index: int, size: int) -> Iterator[int]:
    """Yield `index`, then all other indices in a fixed order that keeps the stand-ins of neighbours far apart.

    Raises:
        IndexError: `index` is out of range.
    """
    if not -size <= index < size:
        raise IndexError(f"index: expected less than {size}, got {index}")
    stride = _coprime_near(0.618 * size, size)
    return ((index + step * stride) % size for step in range(size))


def _coprime_near(value: float, size: int) -> int:
    """Return a step that reaches all of `size` indices and sends neighbours far apart."""
    step = max(1, round(value))
    while math.gcd(step, size) != 1:
        step += 1
    return step
