# SPDX-License-Identifier: Apache-2.0
"""Examples of a data set, what is done about bad ones, and loading by several processes."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from cumo.data import BadSampleError, Collator, ConversationDataset, DataSource
from cumo.data import rows as rows_module
from tests.data.samples import byte_processor, llava


def dataset_of(sources, processor, **options):
    sources = sources if isinstance(sources, list) else [sources]
    return ConversationDataset(sources, processor, "plain", progress=False, **options)


def answer_of(processor, example):
    """What is trained on, as text."""
    labels = example["labels"]
    return processor.tokenizer.decode(labels[labels != -100])


def test_an_example(files, processor):
    picture = files.picture(width=30, height=10)
    example = dataset_of(files.json([llava("q", "yes", images=picture, id="a")]), processor)[0]
    image = processor.image_token_id
    assert example["input_ids"][:5].tolist() == [1, *[image] * 4]
    assert answer_of(processor, example) == "yes\n" and (example["labels"][:5] == -100).all()
    assert example["pixel_values"].shape == (1, 3, 12, 12) and example["pixel_values"].dtype == torch.float32
    assert example["row"].tolist() == [0]


def test_pictures_are_padded_or_cut_to_squares(files, processor):
    """A wide picture, left half black, right half white."""
    values = np.zeros((10, 40, 3), dtype=np.uint8)
    values[:, 20:] = 255
    Image.fromarray(values).save(files.folder / "wide.png")
    source = files.json([llava(images="wide.png")])
    padded, cut = (dataset_of(source, processor, image_aspect=aspect)[0]["pixel_values"][0, 0] for aspect in
                   ("pad", "square"))  # fmt: skip
    assert cut[:, 0].std() < 1e-3, "the picture alone"
    assert padded[0].std() < 1e-3 and padded[5].std() > 0.1, "the mean colour above it"


def test_several_pictures_stay_where_they_stand(files, processor):
    names = [files.picture(f"{index}.png", seed=index) for index in range(3)]
    row = {
        "images": names,
        "messages": [
            {"role": "user", "content": "<image>a<image>"},
            {"role": "assistant", "content": "one"},
            {"role": "user", "content": "b<image>"},
            {"role": "assistant", "content": "two"},
        ],
    }
    dataset = ConversationDataset([files.json([row])], processor, "llava_v1", progress=False)
    ids = dataset[0]["input_ids"].tolist()
    text = "".join("@" if token == processor.image_token_id else processor.tokenizer.decode([token]) for token in ids)
    assert "USER: @@@@a@@@@ ASSISTANT: one</s>USER: @@@@\nb ASSISTANT: two</s>" in text
    alone = [dataset_of(files.json([llava(images=name)], "alone.json"), processor)[0]["pixel_values"] for name in names]
    assert torch.equal(dataset[0]["pixel_values"], torch.cat(alone))


def test_larger_pictures(files):
    source = files.json([llava(images=files.picture())])
    example = dataset_of(source, byte_processor(high_resolution_size=24), high_resolution=True)[0]
    assert example["pixel_values_large"].shape == (1, 3, 24, 24)
    with pytest.raises(ValueError, match="high_resolution: expected False for a processor without"):
        dataset_of(source, byte_processor(), high_resolution=True)


def test_sources_one_after_the_other(files, processor):
    first = files.json([llava(id=index) for index in range(4)], "a.json")
    second = files.jsonl([llava("q" * index, id=10 + index) for index in range(3)], "b.jsonl")
    second = DataSource(second.path, sampling="end:2", weight=2)
    dataset = dataset_of([first, second], processor)
    assert len(dataset) == 4 + 4
    places = [dataset.place(int(dataset[index]["row"])) for index in (0, 4, 5, 6)]
    assert places[0] == f"{first.path}:2: row 1, sample 0"
    assert [place.partition(": ")[2] for place in places[1:]] == [
        "row 2, sample 11",
        "row 3, sample 12",
        "row 2, sample 11",
    ]
    assert dataset.has_image == [False] * 8 and len(dataset.lengths) == 8


def test_a_file_larger_than_a_chunk(files, processor, monkeypatch):
    """Rows across the chunks that are read, each found again."""
    monkeypatch.setattr(rows_module, "CHUNK", 300)
    rows = [llava("q" * (index % 50), f"answer {index}", id=index) for index in range(200)]
    source = files.json(rows)
    dataset = dataset_of(source, processor)
    assert len(dataset) == 200
    for index in (0, 1, 77, 198, 199):
        assert answer_of(processor, dataset[index]) == f"answer {index}\n"


def test_estimated_lengths_and_true_ones(files, processor):
    rows = [llava("q", "a" * 400, images=files.picture()), llava("q", "b" * 40)]
    dataset = dataset_of(files.json(rows), processor)
    assert dataset.lengths == [1 + (401 + len("<image>")) // 4 + 4, 1 + 41 // 4]
    assert [dataset.token_count(index) for index in (0, 1)] == [len(dataset[index]["input_ids"]) for index in (0, 1)]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_give_the_same_batches(files, processor, workers):
    rows = [llava("q", "a" * index, images=files.picture(f"{index}.png", seed=index)) for index in range(1, 9)]
    dataset = dataset_of(files.json(rows), processor)
    loader = DataLoader(dataset, 3, num_workers=workers, collate_fn=Collator(0, rows=True))
    batches = list(loader)
    assert [batch["rows"].tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    expected = Collator(0, rows=True)([dataset[index] for index in (3, 4, 5)])
    for name, value in expected.items():
        assert torch.equal(batches[1][name], value), name


def bad_rows(files):
    """Good rows, and one that shows only when it is loaded, in the middle."""
    rows = [llava(answer=f"answer {index}", id=index) for index in range(6)]
    rows[2] = llava(images=["absent.png"], id=2)
    return files.json(rows)


def test_a_bad_sample_stops(files, processor):
    dataset = dataset_of(bad_rows(files), processor)
    with pytest.raises(
        BadSampleError, match=r"data.json:\d+: row 3, sample 2: picture '.*absent.png': expected a file"
    ):
        dataset[2]
    assert answer_of(processor, dataset[3]) == "answer 3\n"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_is_skipped(files, processor, caplog, workers):
    dataset = dataset_of(bad_rows(files), processor, on_bad_sample="skip")
    loader = DataLoader(dataset, 2, num_workers=workers, collate_fn=Collator(0, rows=True))
    with caplog.at_level(logging.WARNING):
        rows = [batch["rows"].tolist() for batch in loader]
        again = [batch["rows"].tolist() for batch in loader]
    assert rows == again, "always the same one stands in"
    flat = [row for batch in rows for row in batch]
    assert len(flat) == 6 and 2 not in flat and set(flat) == {0, 1, 3, 4, 5}
    assert len(dataset.skipped) == 1 and dataset.skipped[0].startswith(str(files.folder / "data.json:"))
    if workers == 0:
        assert len(caplog.records) == 1


def test_structural_faults_stop_at_once(files, processor):
    rows = [llava(), llava(answer=""), "broken", llava("<image>")]
    with pytest.raises(BadSampleError, match=r"data.jsonl:2: row 2, sample None: .* \(2 more bad rows\)"):
        dataset_of(files.jsonl(rows), processor)
    dataset = dataset_of(files.jsonl(rows), processor, on_bad_sample="skip")
    assert len(dataset) == 1 and len(dataset.skipped) == 3
    first = DataSource(files.jsonl(rows).path, sampling="first:1")
    assert len(dataset_of(first, processor)) == 1, "bad rows that are not taken do not matter"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (llava("q", "a" * 300), "expected at most max_length=100 tokens, got 302"),
        (llava("q", "a" * 300, images=["a.png"]), "got 306 with 1 pictures"),
    ],
)
def test_what_is_too_long_is_not_cut(files, processor, row, message):
    files.picture("a.png")
    with pytest.raises(BadSampleError, match=message):
        dataset_of(files.json([row]), processor, max_length=100)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_bad_sample": "ignore"}, "on_bad_sample: expected one of"),
        ({"image_aspect": "anyres"}, "image_aspect: expected one of"),
        ({"max_length": 0}, "max_length: expected a positive integer"),
    ],
)
def test_bad_arguments(files, processor, options, message):
    with pytest.raises(ValueError, match=message):
        dataset_of(files.json([llava()]), processor, **options)


def test_no_sources_and_nothing_good(files, processor):
    with pytest.raises(ValueError, match="sources: expected at least one"):
        dataset_of([], processor)
    with pytest.raises(ValueError, match="sources: expected at least one good row"):
        dataset_of(files.jsonl(["broken"]), processor, on_bad_sample="skip")
    dataset = dataset_of(files.json([llava(images="absent.png")]), processor, on_bad_sample="skip")
    with pytest.raises(ValueError, match="sources: expected at least one good sample"):
        dataset[0]
    with pytest.raises(IndexError):
        dataset[1]
