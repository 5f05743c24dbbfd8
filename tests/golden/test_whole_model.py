# SPDX-License-Identifier: Apache-2.0
"""Both published models as a whole: logits, losses, gradients, generated ids; and their checkpoints there and back."""

import pytest
import torch

pytest.importorskip("transformers", reason="CuMo is built on transformers")

from cumo.checkpoints.layout import unstack_state_dict
from cumo.checkpoints.published import published_name, to_native, to_published
from cumo.config import CuMoConfig
from cumo.models.cumo import CuMoForConditionalGeneration
from tests.golden.data import below, golden, load_tensors
from tests.numerics import assert_bitwise_equal, relative_error

MODELS = ["mistral", "mixtral"]
IMAGE, IGNORED = -200, -100


@pytest.fixture(params=MODELS)
def case(request, device):
    """The model with published weights, and the batch with its results."""
    folder = golden(f"checkpoint_cumo_{request.param}")
    config = CuMoConfig.from_pretrained(folder)
    config.vision_config.keep_unused_layers = True
    model = CuMoForConditionalGeneration(config).to(device).eval()
    weights, _ = load_tensors(f"checkpoint_cumo_{request.param}/model.safetensors", device)
    model.load_state_dict(to_native(weights), strict=True)
    expected, _ = load_tensors(f"cumo_{request.param}.safetensors", device)
    return model, weights, expected


def expand(row, values, patches, fill):
    """`values` of one sample, with every image token's value replaced by `patches` times `fill`."""
    pieces = [
        torch.full((patches,), fill) if token == IMAGE else value[None]
        for token, value in zip(row, values, strict=True)
    ]
    return torch.cat(pieces)


def batch_of(model, expected):
    """The published batch as our model takes it: placeholders expanded, padded on the right."""
    patches, image_token = model.config.vision_config.num_patches, model.config.image_token_id
    columns = {"input_ids": image_token, "labels": IGNORED, "attention_mask": True}
    rows = {name: [] for name in columns}
    for i, row in enumerate(expected["input_ids"]):
        kept = expected["attention_mask"][i].bool()
        for name, fill in columns.items():
            rows[name].append(expand(row[kept], expected[name][i][kept], patches, fill))
    pads = {"input_ids": 0, "labels": IGNORED, "attention_mask": False}
    pad = torch.nn.utils.rnn.pad_sequence
    batch = {name: pad(rows[name], batch_first=True, padding_value=value) for name, value in pads.items()}
    return batch | {"attention_mask": batch["attention_mask"].long()}


def test_logits_losses_and_gradients(case):
    model, _, expected = case
    batch = batch_of(model, expected)
    has_image = (expected["input_ids"] == IMAGE).any(dim=1)
    assert has_image.all()
    output = model(**batch, pixel_values=expected["pixel_values"])
    for i, length in enumerate(expected["expanded_lengths"].tolist()):
        assert relative_error(output.logits[i, :length], expected["logits"][i, :length]) <= 1e-4
    assert relative_error(output.lm_loss, expected["lm_loss"]) <= 1e-5
    assert relative_error(output.loss, expected["loss"]) <= 1e-5
    output.loss.backward()
    grads = unstack_state_dict({published_name(n): p.grad for n, p in model.named_parameters() if p.grad is not None})
    wanted = below(expected, "grad.")
    errors = {name: relative_error(grads[name], gradient) for name, gradient in wanted.items()}
    assert max(errors.values()) <= 1e-4, errors


def test_generated_ids(case):
    model, _, expected = case
    patches, image_token = model.config.vision_config.num_patches, model.config.image_token_id
    prompt = expected["prompt_ids"][0]
    ids = expand(prompt, prompt, patches, image_token)[None]
    wanted = expected["generated_ids"]
    new = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=expected["pixel_values"][:1],
        max_new_tokens=wanted.shape[1],
        do_sample=False,
    )
    assert new[:, ids.shape[1] :].tolist() == wanted.tolist()


def test_checkpoints_come_back_bit_by_bit(case):
    model, weights, _ = case
    assert_bitwise_equal(to_published(model.state_dict()), weights)
