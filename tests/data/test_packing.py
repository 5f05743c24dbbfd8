# SPDX-License-Identifier: Apache-2.0
"""Packing: rows are full, nothing is lost, and losses and gradients are those of the samples alone."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cumo.data import BadSampleError, Collator, ConversationDataset, PackedDataset
from cumo.data.packing import plan_rows
from tests.data.samples import byte_processor, llava
from tests.models.tiny import PATCHES, tiny_model
from tests.numerics import relative_error


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3)), max_size=60),
    st.integers(30, 50),
    st.sampled_from([3, 5, None]),
    st.integers(0, 3),
)
def test_every_sample_once_and_no_row_too_long(samples, max_length, max_images, seed):
    lengths, images = [length for length, _ in samples], [image for _, image in samples]
    rows = plan_rows(lengths, images, max_length, max_images, np.random.default_rng(seed))
    assert sorted(index for row in rows for index in row) == [index for index, length in enumerate(lengths) if length]
    for row in rows:
        assert sum(lengths[index] for index in row) <= max_length
        assert max_images is None or sum(images[index] for index in row) <= max_images


def test_rows_are_nearly_full():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5, 1, 5000), 10, 2048).astype(int).tolist()
    rows = plan_rows(lengths, [1] * 5000, 2048, 32, rng)
    assert sum(lengths) / (len(rows) * 2048) > 0.97


def rows_of(files, count=9):
    """Samples of different lengths, with none, one or two pictures."""
    rows = []
    for index in range(count):
        names = [files.picture(f"{index}-{number}.png", seed=10 * index + number) for number in range(index % 3)]
        rows.append(llava("q" * (index + 1), "yes " * (1 + index % 4), images=names or None, id=index))
    return rows


def dataset_of(files, rows, processor, **options):
    return ConversationDataset(
        [files.json(rows)], processor, "llava_v1", progress=False, **{"max_length": 250, **options}
    )


def test_a_row(files, processor):
    dataset = dataset_of(files, rows_of(files), processor)
    packed = PackedDataset(dataset, 600, max_images=4, progress=False)
    assert sorted(index for row in packed.rows for index in row) == list(range(9))
    for number, members in enumerate(packed.rows):
        row, examples = packed[number], [dataset[member] for member in members]
        assert torch.equal(row["input_ids"], torch.cat([example["input_ids"] for example in examples]))
        starts = (row["position_ids"] == 0).nonzero().flatten().tolist()
        lengths = [len(example["input_ids"]) for example in examples]
        assert starts == np.cumsum([0, *lengths[:-1]]).tolist()
        assert (row["labels"][starts] == -100).all(), "the sample before it does not predict a BOS"
        assert row["row"].tolist() == members
        assert sum(len(example.get("pixel_values", ())) for example in examples) == len(row.get("pixel_values", ()))
        assert packed.lengths[number] == len(row["input_ids"]) <= 600
        assert packed.has_image[number] == ("pixel_values" in row)
    assert packed.place(2) == dataset.place(2)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("text_type", ["llama", "mixtral"])
def test_losses_and_gradients_are_those_of_the_samples_alone(files, text_type, attention):
    """A token sees its own sample only: what is learnt is the sum of what each sample teaches."""
    torch.manual_seed(0)
    processor = byte_processor(image_seq_length=PATCHES)
    vocabulary = len(processor.tokenizer)
    model = tiny_model(text_type=text_type, text={"vocab_size": vocabulary}, image_token_id=processor.image_token_id)
    model.set_attn_implementation(attention)
    model.config.balance_loss_coef = 0.0  # a mean over all positions is no sum over samples
    dataset = dataset_of(files, rows_of(files, 4), processor)
    packed = PackedDataset(dataset, 1000, progress=False)
    assert len(packed) == 1
    batch = Collator(0)([packed[0]])
    output = model(**batch)
    trained = (batch["labels"][:, 1:] != -100).sum()
    output.lm_loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total = torch.zeros(())
    for index in range(4):
        alone = Collator(0)([dataset[index]])
        loss = model(**alone).lm_loss * (alone["labels"][:, 1:] != -100).sum() / trained
        loss.backward()
        total += loss.detach()
    assert relative_error(output.lm_loss, total) <= 1e-6
    for name, parameter in model.named_parameters():
        if name in grads and not name.endswith("k_proj.bias"):
            assert relative_error(grads[name], parameter.grad) <= 1e-4, name


def test_a_neighbour_changes_nothing(files):
    processor = byte_processor(image_seq_length=PATCHES)
    model = tiny_model(text={"vocab_size": len(processor.tokenizer)}, image_token_id=processor.image_token_id)
    dataset = dataset_of(files, rows_of(files, 2), processor)
    row = PackedDataset(dataset, 1000, progress=False)[0]
    batch = Collator(0)([row])
    starts = (row["position_ids"] == 0).nonzero().flatten().tolist()
    with torch.no_grad():
        before = model(**batch).logits
        changed = {**batch, "input_ids": batch["input_ids"].clone()}
        changed["input_ids"][0, starts[0] + 1] = 7
        after = model(**changed).logits
    assert torch.equal(before[:, starts[1] :], after[:, starts[1] :])
    assert not torch.equal(before[:, : starts[1]], after[:, : starts[1]])


def test_the_plan_depends_on_the_seed_alone(files, processor):
    dataset = dataset_of(files, rows_of(files), processor)
    plans = [PackedDataset(dataset, 800, seed=seed, progress=False).rows for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]
    assert PackedDataset(dataset, 800, workers=2, progress=False).rows == plans[0]


def test_bad_samples(files, processor):
    rows = [*rows_of(files, 3), llava("q" * 300, id="long"), llava(images=["absent.png"], id="absent")]
    with pytest.raises(BadSampleError, match="sample 'long': expected at most max_length=250 tokens"):
        PackedDataset(dataset_of(files, rows, processor), 300, progress=False)
    dataset = dataset_of(files, rows, processor, on_bad_sample="skip")
    packed = PackedDataset(dataset, 1000, progress=False)
    assert sorted(packed[0]["row"].tolist()) == [0, 1, 2]
    assert len(packed.skipped) == 2
    many = [llava("q", images=[files.picture()] * 3, id="many"), llava()]
    with pytest.raises(BadSampleError, match="sample 'many': expected at most max_images=2 pictures, got 3"):
        PackedDataset(dataset_of(files, many, processor), 300, max_images=2, progress=False)


def test_bad_arguments(files, processor):
    dataset = dataset_of(files, rows_of(files, 2), processor)
    with pytest.raises(ValueError, match="max_length: expected at least the 250 of the samples, got 100"):
        PackedDataset(dataset, 100)
    with pytest.raises(ValueError, match="max_images: expected a positive integer, got 0"):
        PackedDataset(dataset, 300, max_images=0)
    with pytest.raises(IndexError):
        PackedDataset(dataset, 300, progress=False)[99]
