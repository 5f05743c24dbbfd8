# SPDX-License-Identifier: Apache-2.0
"""The published CLIP-MoE and its multi-scale tower: features, losses and every gradient."""

import json

import pytest
import torch

pytest.importorskip("transformers", reason="the vision encoder is built on transformers")

from cumo.checkpoints.layout import stack_state_dict, unstack_state_dict
from cumo.config import CuMoVisionConfig
from cumo.models.vision import CuMoVisionModel
from cumo.nn.losses import routing_losses
from tests.golden.data import below, golden, load_tensors
from tests.numerics import relative_error

LAYER = "encoder.layers."


def published(name: str) -> str:
    """Our name of a parameter of the encoder -> the published one."""
    return name.replace("layers.", LAYER, 1).replace(".mlp.", ".") if name.startswith("layers.") else name


def load(parameters, config, device) -> CuMoVisionModel:
    """The encoder with published weights."""
    model = CuMoVisionModel(config).to(device)
    state = stack_state_dict(parameters)
    names = {published(name): name for name in model.state_dict()}
    assert names.keys() == state.keys()
    model.load_state_dict({names[name]: tensor for name, tensor in state.items()}, strict=True)
    return model


def config_of(metadata, **options) -> CuMoVisionConfig:
    """What a file's metadata say of its model."""
    return CuMoVisionConfig(
        encoder_config={"model_type": "clip_vision_model", **json.loads(metadata["vision_config"])},
        num_experts=int(metadata["num_experts"]),
        num_experts_per_tok=int(metadata["num_selected"]),
        keep_unused_layers=True,
        **options,
    )


@pytest.mark.usefixtures("backend")
def test_clip_moe(device):
    expected, metadata = load_tensors("clip_moe.safetensors", device)
    model = load(below(expected, "param."), config_of(metadata, scales=[1]), device)
    features, routings = model.encode(expected["pixel_values"])
    losses = routing_losses(routings, [len(features)])
    loss = (features * expected["cotangent"]).sum() / 100 + 0.1 * losses.balance + 0.01 * losses.z
    loss.backward()
    grads = {
        published(name): torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }
    styles = {f"{LAYER}{layer}.": "clip" for layer in range(len(model.layers))}
    actual = {"features": features, "balance_loss": losses.balance, "z_loss": losses.z}
    actual |= {f"grad.{name}": grad for name, grad in unstack_state_dict(grads, styles).items()}
    results = {name for name in expected if name.startswith("grad.")} | {"features", "balance_loss", "z_loss"}
    # softmax does not see what is added to all scores: the gradient of the keys' biases is nothing but rounding
    key_biases = {name for name in results if name.endswith("k_proj.bias")}
    errors = {name: relative_error(actual[name], expected[name]) for name in sorted(results - key_biases)}
    assert max(errors.values()) <= 1e-5, errors
    for name in key_biases:
        assert actual[name].norm() <= 1e-5 * actual[name.replace("k_proj", "q_proj")].norm()


@pytest.mark.usefixtures("backend")
def test_multiscale_tower(device):
    expected, metadata = load_tensors("multiscale_tower.safetensors", device)
    config = config_of(metadata, scales=json.loads(metadata["scales"]))
    model = load(below(expected, "param.vision_model."), config, device)
    output = model(expected["pixel_values"])
    losses = routing_losses(output.routings, output.tiles_per_scale)
    actual = {"features": output.features, "balance_loss": losses.balance, "z_loss": losses.z}
    errors = {name: relative_error(tensor, expected[name]) for name, tensor in actual.items()}
    assert max(errors.values()) <= 2e-5, errors


def test_features_do_not_depend_on_the_unused_block(device):
    expected, metadata = load_tensors("multiscale_tower.safetensors", device)
    config = config_of(metadata, scales=json.loads(metadata["scales"]))
    model = load(below(expected, "param.vision_model."), config, device)
    with_it = model(expected["pixel_values"])
    model.config.keep_unused_layers = False
    without = model(expected["pixel_values"])
    assert torch.equal(with_it.features, without.features)
    assert len(with_it.routings) == len(model.layers) > len(without.routings) == config.num_used_layers


def test_dense_tower(device):
    """The dense tower that the first two stages leave."""
    expected, _ = load_tensors("dense_stage.safetensors", device)
    encoder = json.loads((golden("tiny_clip") / "config.json").read_text())
    state = below(torch.load(golden("clip.bin"), map_location=device, weights_only=True), "vision_model.")
    scales = json.loads((golden("checkpoint_cumo_mistral") / "config.json").read_text())["scales"]
    config = CuMoVisionConfig(encoder_config=encoder, num_experts=1, num_experts_per_tok=1, scales=scales)
    model = CuMoVisionModel(config).to(device)
    model.load_state_dict({name.replace("encoder.layers.", "layers."): t for name, t in state.items()}, strict=True)
    assert relative_error(model(expected["pixel_values"]).features, expected["dense_features"]) <= 1e-5
