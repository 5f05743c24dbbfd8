# SPDX-License-Identifier: Apache-2.0
"""Data files of any bytes: every fault is told with its place, and what is trained on is the good rows."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given

from cumo.data import BadSampleError, ConversationDataset, DataSource, check_data, read_sources
from cumo.models.tokenizer import IMAGE_TOKEN
from tests.data.samples import Files, byte_processor, llava
from tests.fuzz.mutate import RANDOM, as_json, cases, damaged, mutated

PROCESSOR = byte_processor()
ROWS: list[Any] = [
    llava("first", images=["a.png"], id="one"),
    llava("<image>", images=["a.png", "a b/ç.png"], id=2),
    llava("no picture", "an answer"),
    {
        "id": None,
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what?"}]},
            {"role": "assistant", "content": "noise </s>"},
            {"role": "user", "content": "more?"},
            {"role": "assistant", "content": [{"type": "text", "text": "no"}]},
        ],
    },
    {
        "images": [{"path": "a.png", "bytes": None}],
        "conversations": [{"from": "human", "value": IMAGE_TOKEN}, {"from": "gpt", "value": "x"}],
    },
]
MIXTURE = {
    "datasets": [
        {"json_path": "data.json", "sampling_strategy": "first:2", "image_folder": ".", "weight": 0.5},
        {"json_path": "data.json", "sampling_strategy": "end:50%"},
    ]
}


def pictures(folder: Path) -> None:
    """Those that the rows name, and one that is damaged."""
    files = Files(folder)
    (folder / "a b").mkdir()
    whole = (folder / files.picture("a.png")).read_bytes()
    files.picture("a b/ç.png", seed=1)
    (folder / "x").write_bytes(whole[:50])


def write(folder: Path, random: Random) -> Path:
    """A data file of mutated rows."""
    pictures(folder)
    rows = mutated(ROWS, random, most=3)
    if random.randrange(2):
        path = folder / "data.json"
        raw = as_json(rows, random)
    else:
        path = folder / "data.jsonl"
        raw = b"\n".join(as_json(row, random, True) for row in (rows if isinstance(rows, list) else [rows]))
    path.write_bytes(damaged(raw, random) if random.randrange(6) == 0 else raw)
    return path


def check_file(random: Random) -> None:
    """The report and the dataset say the same of a file."""
    with tempfile.TemporaryDirectory() as name:
        source = DataSource(str(write(Path(name), random)))
        report = check_data([source], PROCESSOR, max_length=500, progress=False)
        str(report).encode()
        assert all(str(fault).startswith(source.path) and fault.reason for fault in report.faults)
        assert all(len(str(fault)) < 3000 for fault in report.faults)
        good = len(report.lengths)
        if good:
            dataset = ConversationDataset([source], PROCESSOR, max_length=500, on_bad_sample="skip", progress=False)
            seen = {int(dataset[index]["row"]) for index in range(len(dataset))}
            assert len(seen) == good
            assert len(dataset.skipped) == len(report.faults)
        else:
            assert report.faults
        if report.faults:
            with pytest.raises((BadSampleError, ValueError), match="data.json"):
                dataset = ConversationDataset([source], PROCESSOR, max_length=500, progress=False)
                [dataset[index] for index in range(len(dataset))]


def check_mixture(random: Random) -> None:
    """A mixture gives sources, or an error that names it."""
    import yaml

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures(folder)
        (folder / "data.json").write_text(json.dumps(ROWS))
        path = folder / "mixture.yaml"
        mixture = mutated(MIXTURE, random)
        raw = as_json(mixture, random)
        if random.randrange(2):
            raw = yaml.safe_dump(mixture, allow_unicode=True).encode("utf-8", "surrogatepass")
            raw = damaged(raw, random) if random.randrange(2) else raw
        path.write_bytes(raw)
        try:
            sources = read_sources(path)
        except (ValueError, OSError) as error:
            assert str(path) in str(error) and len(str(error)) < 3000
            return
        report = check_data(sources, PROCESSOR, max_length=500, progress=False)
        assert report.lengths or report.faults
        with contextlib.suppress(ValueError, OSError):
            ConversationDataset(sources, PROCESSOR, max_length=500, on_bad_sample="skip", progress=False)


@cases()
@given(RANDOM)
def test_data_files(random):
    check_file(random)


@cases()
@given(RANDOM)
def test_mixtures(random):
    check_mixture(random)
