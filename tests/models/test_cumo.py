# SPDX-License-Identifier: Apache-2.0
"""The whole model beyond the published case: other language models, text without pictures, generation in batches."""

import pytest
import torch

pytest.importorskip("transformers", reason="CuMo is built on transformers")

from cumo.config import CuMoConfig
from cumo.models.cumo import CuMoForConditionalGeneration
from tests.numerics import relative_error

ENCODER = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 12,
    "patch_size": 4,
}
TEXT = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
PATCHES, IMAGE = 9, 50


@pytest.fixture(params=["llama", "qwen2", "mixtral"])
def model(request):
    """A small random model; no token ends the text, so that every generation is as long as allowed."""
    torch.manual_seed(0)
    moe = {"num_local_experts": 4, "num_experts_per_tok": 2} if request.param == "mixtral" else {}
    text = {**TEXT, **moe, "model_type": request.param, "eos_token_id": None}
    vision = {"encoder_config": ENCODER, "scales": [1, 2]}
    return CuMoForConditionalGeneration(CuMoConfig(vision_config=vision, text_config=text)).eval()


def with_picture(*tokens):
    """Ids of a text that begins with a picture."""
    return [1, *[IMAGE] * PATCHES, *tokens]


def pad(rows, side):
    """Ids and mask of rows of different lengths."""
    pad_sequence = torch.nn.utils.rnn.pad_sequence
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_side=side)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True, padding_side=side)
    return ids, mask


def test_text_without_pictures_does_not_touch_the_encoder(model, monkeypatch):
    monkeypatch.setattr(model.vision_tower, "forward", lambda *_: pytest.fail("the encoder ran"))
    ids = torch.tensor([[1, 7, 8, 9]])
    output = model(input_ids=ids, labels=ids)
    expected = model.language_model(input_ids=ids).logits
    assert relative_error(output.logits, expected) <= 1e-6
    assert output.vision_losses is None and output.connector_losses is None
    assert (output.text_losses is not None) == (model.config.text_config.model_type == "mixtral")


def test_each_sample_is_what_it_is_alone(model):
    rows = [with_picture(5, 6), [1, 7, 8], [1, 4, *[IMAGE] * PATCHES, 3, *[IMAGE] * PATCHES, 9]]
    pixels = torch.randn(3, 3, 12, 12)
    ids, mask = pad(rows, "right")
    together = model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
    for row, pictures, logits in zip(rows, (pixels[:1], None, pixels[1:]), together, strict=True):
        alone = model(input_ids=torch.tensor([row]), pixel_values=pictures).logits[0]
        assert relative_error(logits[: len(row)], alone) <= 1e-5


def test_batched_generation_equals_one_by_one_and_cache_equals_no_cache(model):
    rows = [with_picture(5, 6), [1, 7, 8], with_picture(9)]
    pixels = torch.randn(2, 3, 12, 12)
    ids, mask = pad(rows, "left")
    options = {"max_new_tokens": 6, "do_sample": False}
    batch = model.generate(input_ids=ids, attention_mask=mask, pixel_values=pixels, **options)[:, ids.shape[1] :]
    for row, pictures, new in zip(rows, (pixels[:1], None, pixels[1:]), batch, strict=True):
        one = torch.tensor([row])
        for use_cache in (True, False):
            alone = model.generate(
                input_ids=one,
                attention_mask=torch.ones_like(one),
                pixel_values=pictures,
                use_cache=use_cache,
                **options,
            )
            assert alone[0, len(row) :].tolist() == new.tolist()


def test_the_loss_is_the_sum_of_its_weighted_parts(model):
    ids = torch.tensor([with_picture(5, 6, 7)])
    output = model(input_ids=ids, labels=ids.masked_fill(ids == IMAGE, -100), pixel_values=torch.randn(1, 3, 12, 12))
    parts = [p for p in (output.vision_losses, output.connector_losses, output.text_losses) if p is not None]
    total = output.lm_loss + 0.1 * sum(p.balance for p in parts) + 0.01 * sum(p.z for p in parts)
    torch.testing.assert_close(output.loss, total)
    output.loss.backward()
    assert model.vision_tower.layers[0].mlp.gate.weight.grad.norm() > 0


def test_saved_and_loaded_it_is_the_same(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = CuMoForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.image_token_id == model.config.image_token_id
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.parametrize(
    ("row", "pictures", "message"),
    [
        (with_picture(5), 2, r"expected 9 image tokens for each of 2 pictures, got 9, by sample \[9\]"),
        (with_picture(5)[:-2], 1, r"expected 9 image tokens for each of 1 pictures, got 8, by sample \[8\]"),
        (with_picture(5), 0, "pixel_values: input_ids hold image tokens, but no pictures were given"),
    ],
    ids=["a picture too many", "a placeholder too few", "no picture"],
)
def test_pictures_and_placeholders_have_to_match(model, row, pictures, message):
    pixels = torch.randn(pictures, 3, 12, 12) if pictures else None
    with pytest.raises(ValueError, match=message):
        model(input_ids=torch.tensor([row]), pixel_values=pixels)
