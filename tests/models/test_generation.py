# SPDX-License-Identifier: Apache-2.0
"""Generation that repeats samples or runs a second model: each text keeps the pictures of its own prompt."""

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="CuMo is built on transformers")

from cumo.models.placeholders import pictures_per_row, repeat_pictures
from tests.models.tiny import IMAGE, PATCHES, tiny_model

PICTURE = [IMAGE] * PATCHES
NONE, ONE, TWO = [1, 7, 8], [1, *PICTURE, 5, 6], [1, *PICTURE, 4, *PICTURE, 9]
OPTIONS = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3, "num_return_sequences": 3}


def sharp_model(**options):
    """Random, with weights so large that pictures matter for what is said."""
    torch.manual_seed(0)
    return tiny_model(text={"initializer_range": 0.5, "eos_token_id": None}, **options)


def inputs_of(rows, pixels, large=None):
    """Of `generate`, padded on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    return inputs if large is None else {**inputs, "pixel_values_large": [large]}


def new_tokens(model, inputs, **options):
    """What is said after the prompts."""
    sequences = model.generate(**inputs, **options)
    return sequences[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("high_resolution", [False, True])
@pytest.mark.parametrize(
    "rows", [[TWO], [NONE, ONE, TWO], [TWO, NONE, ONE]], ids=["two pictures", "0, 1 and 2", "2, 0 and 1"]
)
def test_beams_see_the_pictures_of_their_own_prompt(rows, high_resolution):
    model = sharp_model(vision={"high_resolution": high_resolution})
    counts = [row.count(IMAGE) // PATCHES for row in rows]
    pixels = 3 * torch.randn(sum(counts), 3, 12, 12)
    large = 3 * torch.randn(sum(counts), 3, 24, 24) if high_resolution else None
    together = new_tokens(model, inputs_of(rows, pixels, large), **OPTIONS)
    begin, alone = 0, []
    for row, count in zip(rows, counts, strict=True):
        own = slice(begin, begin + count)
        begin += count
        pictures = pixels[own] if count else None
        larger = None if large is None or not count else large[own]
        alone += new_tokens(model, inputs_of([row], pictures, larger), **OPTIONS)
    assert together == alone
    assert len(set(map(tuple, together))) > len(rows), "beams do not differ, which would hide a mistake"


def test_sampled_sequences_see_the_pictures_of_their_own_prompt():
    model, pixels = sharp_model(), 3 * torch.randn(3, 3, 12, 12)
    inputs = inputs_of([ONE, TWO], pixels)
    torch.manual_seed(0)
    sampled = model.generate(
        **inputs,
        max_new_tokens=1,
        do_sample=True,
        num_return_sequences=2,
        return_dict_in_generate=True,
        output_logits=True,
    )
    expected = model(**inputs).logits[:, -1].repeat_interleave(2, dim=0)
    torch.testing.assert_close(sampled.logits[0], expected, rtol=1e-4, atol=1e-4)


def test_beams_of_embeddings():
    model, pixels = sharp_model(), 3 * torch.randn(3, 3, 12, 12)
    model.resize_token_embeddings(60)
    inputs = inputs_of([ONE, TWO], pixels)
    expected = new_tokens(model, inputs, **OPTIONS)
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    options = {"attention_mask": inputs["attention_mask"], "pixel_values": pixels, **OPTIONS}
    assert model.generate(inputs_embeds=embeddings, **options).tolist() == expected


def test_an_assistant_sees_the_pictures_too():
    model = sharp_model()
    assistant = copy.deepcopy(model)
    inputs = inputs_of([TWO], 3 * torch.randn(2, 3, 12, 12))
    expected = new_tokens(model, inputs, max_new_tokens=8, do_sample=False)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    options = {"max_new_tokens": 8, "do_sample": False, "assistant_model": assistant}
    assert new_tokens(model, inputs, **options) == expected
    handle.remove()
    assert len(calls) < 8, "the assistant, which is the same model, drafts what the model says"


def test_pictures_are_repeated_as_blocks_or_refused():
    pictures = torch.tensor([10, 11, 20])
    assert repeat_pictures(pictures, [2, 0, 1], 2).tolist() == [10, 11, 10, 11, 20, 20]
    assert [each.tolist() for each in repeat_pictures([pictures], [1, 2], 2)] == [[10, 10, 11, 20, 11, 20]]
    assert repeat_pictures(None, [1], 2) is None and repeat_pictures(pictures[:0], [0], 2).tolist() == []
    with pytest.raises(ValueError, match=r"pixel_values: expected 2 pictures, by sample \[2\], got 3"):
        repeat_pictures(pictures, [2], 2)
    with pytest.raises(ValueError, match=r"input_ids: expected multiples of 3 image tokens in each sample, got \[2\]"):
        pictures_per_row(torch.tensor([[True, True]]), 3)
