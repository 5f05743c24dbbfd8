# SPDX-License-Identifier: Apache-2.0
"""Find every fault of a data set before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from cumo.data.dataset import BadSampleError, ConversationDataset, Example, Fault
from cumo.data.formats import Sample
from cumo.data.pictures import open_picture
from cumo.data.rows import DataFileError
from cumo.data.sources import DataSource
from cumo.models.prompts import IGNORE_INDEX, Template

BATCH = 16


@dataclass
class DataReport:
    """Result of `check_data`. `str(report)` is a summary for people."""

    files: int = 0
    rows: int = 0
    """Number of rows checked, good and bad: those that sampling can select."""
    text_rows: int = 0
    """Number of good rows without pictures."""
    images: int = 0
    """Number of pictures in good rows."""
    lengths: list[int] = field(default_factory=list)
    """Number of tokens of each good row, pictures included."""
    trained_tokens: int = 0
    faults: list[Fault] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Number of tokens in all good rows, pictures included."""
        return sum(self.lengths)

    def __str__(self) -> str:
        lines = [str(fault) for fault in self.faults]
        lines.append(f"{self.rows} rows of {self.files} files: {len(self.faults)} faults")
        if self.lengths:
            median, most = np.percentile(self.lengths, [50, 99]).round().astype(int)
            lines.append(
                f"good: {len(self.lengths)} rows ({self.text_rows} without pictures), {self.images} pictures, "
                f"{self.tokens} tokens ({self.trained_tokens} trained on)"
            )
            lines.append(f"tokens of a row: half up to {median}, 99 % up to {most}, all up to {max(self.lengths)}")
        return "\n".join(lines)


def check_data(
    sources: Sequence[DataSource],
    processor: Any,
    template: Template | str = "mistral_instruct_system",
    max_length: int = 2048,
    *,
    workers: int = 0,
    progress: bool = True,
) -> DataReport:
    """Read everything that a `ConversationDataset` with these arguments would read, and decode every picture.

    Args:
        sources: sources of the dataset. Where rows are drawn at random, all rows are read.
        processor: processor of the dataset.
        template: prompt template of the dataset.
        max_length: largest number of tokens of a sample.
        workers: number of processes that read; 0 for this process only.
        progress: whether to show a bar.

    Returns:
        A report with all faults. A file that cannot be parsed, such as a JSON list that ends too early, is one fault.
    """
    report = DataReport()
    for source in sources:
        report.files += 1
        try:
            sampling = "all" if source.sampling.startswith("random") else source.sampling
            everything = replace(source, weight=1.0, sampling=sampling)
            dataset = _Checked([everything], processor, template, max_length=max_length, progress=progress)
            source.select(len(dataset.indices[0]), np.random.default_rng(0))
        except DataFileError as error:
            report.faults.append(Fault(error.path, error.line, 0, None, error.reason))
            continue
        except ValueError as error:
            report.faults.append(Fault(source.path, 0, 0, None, str(error)))
            continue
        faults = dataset.structural
        report.rows += len(dataset) + len(faults)
        loader = DataLoader(_Facts(dataset), BATCH, num_workers=workers, collate_fn=list)
        with tqdm(total=len(dataset), desc=Path(source.path).name, disable=not progress) as bar:
            for batch in loader:
                for fact in batch:
                    if isinstance(fact, Fault):
                        faults.append(fact)
                        continue
                    report.lengths.append(fact.tokens)
                    report.trained_tokens += fact.trained
                    report.images += fact.images
                    report.text_rows += not fact.images
                bar.update(len(batch))
        report.faults += sorted(faults, key=lambda fault: fault.row)
    return report


class _Fact(NamedTuple):
    tokens: int
    trained: int
    images: int


class _Checked(ConversationDataset):
    """The rows of a dataset, each once. Pictures are decoded, but no pixels are computed."""

    structural: list[Fault]

    def _leave_out_faults(self) -> None:
        self._rows = np.unique(self._rows)
        faults = self.indices[0].faults
        taken = set(self._rows[np.isin(self._rows, list(faults))].tolist())
        self.structural = [self.fault(row, faults[row]) for row in sorted(taken)]
        self._rows = self._rows[~np.isin(self._rows, list(faults))]

    def _pixels(self, sample: Sample, folder: Path) -> Example:
        for reference in sample.images:
            open_picture(reference, folder)
        return {}


class _Facts(Dataset[Fault | _Fact]):
    def __init__(self, dataset: _Checked) -> None:
        self.dataset = dataset
        self.images = dataset.image_counts

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Fault | _Fact:
        try:
            example = self.dataset.load(index)
        except BadSampleError as error:
            assert error.fault is not None
            return error.fault
        trained = int((example["labels"] != IGNORE_INDEX).sum())
        return _Fact(len(example["input_ids"]), trained, self.images[index])
