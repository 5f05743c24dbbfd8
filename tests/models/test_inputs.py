# SPDX-License-Identifier: Apache-2.0
"""What users of transformers give a model: labels with placeholders, embeddings, a larger vocabulary, odd shapes."""

import pytest
import torch

pytest.importorskip("transformers", reason="CuMo is built on transformers")

from cumo.models.cumo import CuMoForConditionalGeneration, CuMoOutput
from tests.models.tiny import IMAGE, PATCHES, tiny_model
from tests.numerics import relative_error

ROW = [1, *[IMAGE] * PATCHES, 5, 6, 7]


@pytest.fixture
def pixels():
    return torch.randn(1, 3, 12, 12)


def test_labels_may_be_a_copy_of_the_ids(pixels):
    model, ids = tiny_model(), torch.tensor([ROW])
    expected = model(input_ids=ids, pixel_values=pixels, labels=ids.masked_fill(ids == IMAGE, -100))
    labels = ids.clone()
    assert torch.equal(model(input_ids=ids, pixel_values=pixels, labels=labels).loss, expected.loss)
    assert torch.equal(labels, ids), "the caller's labels were changed"


def test_a_tuple_on_request(pixels):
    model, ids = tiny_model(), torch.tensor([ROW])
    output = model(input_ids=ids, pixel_values=pixels)
    assert isinstance(output, CuMoOutput)
    as_tuple = model(input_ids=ids, pixel_values=pixels, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], output.logits)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_vocabulary_can_be_resized(family, tied, pixels, tmp_path):
    torch.manual_seed(0)
    model, ids = tiny_model(text_type=family, text={"tie_word_embeddings": tied}), torch.tensor([ROW])
    before = model(input_ids=ids, pixel_values=pixels).logits
    model.resize_token_embeddings(60)
    output = model(input_ids=ids, pixel_values=pixels, labels=torch.full_like(ids, 57))
    assert torch.equal(output.logits[..., :50], before) and output.logits.shape[-1] == 60
    assert output.lm_loss.isfinite()
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding is head) == tied and len(embedding) == len(head) == 60
    assert model.config.text_config.vocab_size == model.language_model.config.vocab_size == 60
    model.save_pretrained(tmp_path)
    again = CuMoForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again(input_ids=ids, pixel_values=pixels).logits, output.logits)
    assert again.config.image_token_id == IMAGE


def test_pictures_find_their_places_among_embeddings(pixels):
    model, ids = tiny_model(), torch.tensor([ROW])
    model.resize_token_embeddings(60)  # now the image token has an embedding
    expected = model(input_ids=ids, pixel_values=pixels)
    embeddings = model.get_input_embeddings()(ids)
    output = model(inputs_embeds=embeddings, pixel_values=pixels)
    assert relative_error(output.logits, expected.logits) <= 1e-6
    with pytest.raises(ValueError, match=r"expected 9 image tokens for each of 1 pictures, got 8, by sample \[8\]"):
        model(inputs_embeds=embeddings[:, 2:], pixel_values=pixels)


def test_pictures_that_have_no_place_among_embeddings_are_refused(pixels):
    model = tiny_model()
    embeddings = model.get_input_embeddings()(torch.tensor([[1, 5, 6]]))
    with pytest.raises(ValueError, match="inputs_embeds: expected input_ids together with pixel_values, as image_"):
        model(inputs_embeds=embeddings, pixel_values=pixels)
    assert model(inputs_embeds=embeddings).logits.shape == (1, 3, 50)


@pytest.mark.parametrize("shape", [(3, 12, 12), (1, 1, 3, 12, 12), (1, 4, 12, 12), (1, 3, 12, 8)])
def test_pictures_of_other_shapes_are_refused_by_name(shape):
    with pytest.raises(ValueError, match=r"pixel_values: expected pictures of 12 x 12 pixels as \[images, 3, 12, 12\]"):
        tiny_model()(input_ids=torch.tensor([ROW]), pixel_values=torch.zeros(shape))


def test_large_pictures_come_as_a_list(pixels):
    model = tiny_model(vision={"high_resolution": True})
    with pytest.raises(ValueError, match=r"pixel_values_large: expected a list with a tensor for each of the scales"):
        model(input_ids=torch.tensor([ROW]), pixel_values=pixels, pixel_values_large=torch.zeros(1, 3, 24, 24))
