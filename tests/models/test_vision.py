# SPDX-License-Identifier: Apache-2.0
"""The vision encoder beyond the published case: SigLIP, high resolution, checkpointing, saving."""

import pytest
import torch

pytest.importorskip("transformers", reason="the vision encoder is built on transformers")

from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from cumo.config import CuMoVisionConfig
from cumo.models.vision import CuMoVisionModel
from cumo.nn.losses import routing_losses
from tests.numerics import relative_error

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 12,
    "patch_size": 4,
}
FAMILIES = {
    "clip_vision_model": (CLIPVisionConfig, CLIPVisionModel),
    "siglip_vision_model": (SiglipVisionConfig, SiglipVisionModel),
}


def tiny(family="clip_vision_model", **options) -> CuMoVisionModel:
    """A small random encoder."""
    torch.manual_seed(0)
    return CuMoVisionModel(CuMoVisionConfig(encoder_config={"model_type": family, **SIZES}, **options))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_encoder_computes_what_transformers_does(family):
    config_class, model_class = FAMILIES[family]
    ours = tiny(family, num_experts=1, num_experts_per_tok=1, scales=[1]).eval()
    theirs = model_class(config_class(**SIZES)).eval()
    names = {name.split("encoder.")[-1].removeprefix("vision_model."): name for name in theirs.state_dict()}
    state = {name: theirs.state_dict()[names[name]] for name in ours.state_dict()}
    ours.load_state_dict(state, strict=True)
    pixels = torch.randn(2, 3, 12, 12)
    expected = theirs(pixels, output_hidden_states=True).hidden_states[-2]
    expected = expected[:, 1:] if family == "clip_vision_model" else expected
    assert relative_error(ours(pixels).features, expected) <= 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_features_of_all_scales_are_concatenated(family):
    model = tiny(family, scales=[1, 2, 3])
    output = model(torch.randn(2, 3, 12, 12))
    assert output.features.shape == (2, model.config.num_patches, model.config.feature_size) == (2, 9, 96)
    assert output.tiles_per_scale == (2, 8, 18)
    assert len(output.routings) == 2 and output.routings[0].balance_S.shape == (28,)


def test_high_resolution_sees_the_large_picture():
    model = tiny(scales=[1, 2], high_resolution=True)
    pixels, large = torch.randn(2, 3, 12, 12), torch.randn(2, 3, 24, 24)
    features = model(pixels, [large]).features
    assert torch.equal(features[..., :32], model(pixels, [large + 1]).features[..., :32])
    assert not torch.equal(features[..., 32:], model(pixels, [large + 1]).features[..., 32:])
    with pytest.raises(ValueError, match="pixel_values_large: expected shapes .* got \\[\\]"):
        model(pixels)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_neither_losses_nor_gradients(use_reentrant):
    model = tiny(keep_unused_layers=True).train()
    pixels = torch.randn(2, 3, 12, 12, requires_grad=True)

    def loss_and_gradients():
        model.zero_grad()
        output = model(pixels)
        losses = routing_losses(output.routings, output.tiles_per_scale)
        loss = output.features.square().mean() + 0.1 * losses.balance + 0.01 * losses.z
        loss.backward()
        # of the last block only the router learns, from the losses; the keys' biases get nothing but rounding
        named = ((n, p) for n, p in model.named_parameters() if p.grad is not None and "k_proj.bias" not in n)
        return {"loss": loss.detach(), **{name: parameter.grad.clone() for name, parameter in named}}

    plain = loss_and_gradients()
    # renamed in transformers 5.23
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": use_reentrant})
    checkpointed = loss_and_gradients()
    assert model.layers[0].gradient_checkpointing
    assert {"layers.0.mlp.gate.weight", "layers.2.mlp.gate.weight"} <= plain.keys()
    for name, tensor in plain.items():
        assert relative_error(checkpointed[name], tensor) <= 1e-6 or tensor.norm() == 0, name


def test_saved_and_loaded_it_is_the_same(tmp_path):
    model = tiny(scales=[1, 2])
    model.save_pretrained(tmp_path)
    again = CuMoVisionModel.from_pretrained(tmp_path)
    assert again.config.scales == model.config.scales
    assert again.config.encoder_config.hidden_size == SIZES["hidden_size"]
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_goes_through_the_interface_of_transformers(implementation):
    model = tiny()
    pixels = torch.randn(1, 3, 12, 12)
    expected = model(pixels).features
    model.set_attn_implementation(implementation)
    assert model.config.encoder_config._attn_implementation == implementation
    assert relative_error(model(pixels).features, expected) <= 1e-6


def test_pictures_of_another_size_are_refused():
    with pytest.raises(ValueError, match="pixel_values: expected pictures of 12 x 12 pixels as"):
        tiny()(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": [2, 1]}, "scales: expected rising integers from 1 on"),
        ({"num_experts_per_tok": 5}, "top_k: expected an integer in 1..4"),
        ({"feature_layer": -4}, "feature_layer: expected -3..-1 for 3 blocks, got -4"),
        ({"encoder_config": {"model_type": "vit"}}, "encoder_config.model_type: expected one of"),
        ({"probs_dtype": "float64"}, "probs_dtype: expected one of"),
    ],
    ids=["falling scales", "more choices than experts", "a layer that is not there", "another family", "dtype"],
)
def test_bad_configurations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CuMoVisionConfig(**{"encoder_config": {"model_type": "clip_vision_model", **SIZES}, **options})
