# SPDX-License-Identifier: Apache-2.0
"""The whole model beyond the published case: other language models, text without pictures, generation in batches."""

import pytest
import torch

pytest.importorskip("transformers", reason="CuMo is built on transformers")

from transformers.generation.streamers import BaseStreamer

from cumo.models.cumo import CuMoForConditionalGeneration
from cumo.models.experts import execution_paths
from tests.models.tiny import IMAGE, PATCHES, tiny_config, tiny_model
from tests.numerics import relative_error


@pytest.fixture(params=["llama", "qwen2", "mixtral"])
def model(request):
    """A small random model; no token ends the text, so that every generation is as long as allowed."""
    torch.manual_seed(0)
    return tiny_model(text_type=request.param, text={"eos_token_id": None})


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


class Collector(BaseStreamer):
    """Keeps what a streamer is given."""

    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_static_cache_streamer_and_single_beam_give_the_same_tokens(model):
    ids = torch.tensor([with_picture(5, 6)])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 12, 12)}
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**inputs, **options)
    assert model.generate(**inputs, **options, cache_implementation="static").tolist() == expected.tolist()
    streamer = Collector()
    model.generate(**inputs, **options, streamer=streamer)
    assert streamer.ended
    assert [token for piece in streamer.pieces for token in piece] == expected[0].tolist()


def test_beam_search_finds_a_text_that_is_as_likely_as_it_says(model):
    ids = torch.tensor([with_picture(5, 6)])
    pixels = torch.randn(1, 3, 12, 12)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3, "length_penalty": 0.0}
    found = model.generate(**inputs, **options, output_scores=True, return_dict_in_generate=True)
    new = found.sequences[:, ids.shape[1] :]
    logits = model(input_ids=found.sequences, pixel_values=pixels).logits[:, ids.shape[1] - 1 : -1]
    log_likelihood = logits.log_softmax(-1).gather(-1, new[..., None]).sum()
    torch.testing.assert_close(found.sequences_scores[0], log_likelihood, rtol=1e-4, atol=1e-4)
    greedy = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, ids.shape[1] :]
    logits = model(input_ids=torch.cat([ids, greedy], dim=1), pixel_values=pixels).logits[:, ids.shape[1] - 1 : -1]
    assert log_likelihood >= logits.log_softmax(-1).gather(-1, greedy[..., None]).sum() - 1e-4


def test_experts_of_the_language_model_run_on_the_kernels():
    model = tiny_model(text_type="mixtral")
    assert set(execution_paths(model).values()) == {"fused"}
    model.language_model.set_experts_implementation("eager")
    ids = torch.tensor([[1, 7, 8, 9]])
    eager = model(input_ids=ids).logits
    model.language_model.set_experts_implementation("cumo")
    assert relative_error(model(input_ids=ids).logits, eager) <= 1e-5


def test_other_experts_of_the_language_model_can_be_asked_for(tmp_path):
    tiny_model(text_type="mixtral").save_pretrained(tmp_path)
    model = CuMoForConditionalGeneration.from_pretrained(tmp_path, experts_implementation="eager")
    assert model.language_model.config._experts_implementation == "eager"


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


ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}


@pytest.mark.parametrize(("text", "coefficients"), [({}, (0.001, 0.0)), ({"router_aux_loss_coef": 0.3}, (0.3, 0.0))])
def test_experts_of_other_families_have_the_coefficient_of_their_own_configuration(text, coefficients):
    model = tiny_model(text_type="qwen3_moe", text={**ROUTED, **text})
    ids = torch.tensor([[1, 7, 8, 9]])
    output = model(input_ids=ids, labels=ids)
    assert model.config.router_loss_coefs("text") == coefficients
    assert model.config.router_loss_coefs("vision") == (0.1, 0.01)
    torch.testing.assert_close(output.loss, output.lm_loss + coefficients[0] * output.text_losses.balance)
    assert output.text_losses.balance.requires_grad


SIGMOID = {
    **ROUTED,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}


@pytest.mark.parametrize("family", ["glm4_moe", "minimax_m2"])
def test_routers_that_choose_by_sigmoid_have_no_losses_of_a_softmax(family):
    model = tiny_model(text_type=family, text={**SIGMOID, "first_k_dense_replace": 0, "head_dim": 8})
    ids = torch.tensor([[1, 7, 8, 9]])
    output = model(input_ids=ids, labels=ids)
    assert output.text_losses is None and output.text_routings is None
    assert torch.equal(output.loss, output.lm_loss)


def test_a_language_model_without_a_cache_of_keys_and_values_is_refused():
    with pytest.raises(
        ValueError, match="text_config: expected a language model that takes past_key_values, got mamba"
    ):
        tiny_model(text_type="mamba", text={"state_size": 4})


@pytest.mark.parametrize("name", ["balance_loss_coef", "router_z_loss_coef"])
@pytest.mark.parametrize("value", [-1, float("nan"), "0.1", True, None])
def test_weights_of_losses_are_checked(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected a finite number >= 0, got"):
        tiny_config(**{name: value})


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
