# SPDX-License-Identifier: Apache-2.0
"""The fused layer with arguments that are views, and with some gradients wanted and others not."""

import pytest
import torch

from cumo_kernels import tiling
from tests.cumo_kernels.harness import PLAIN_AND_GATED, assert_agrees, make_layer
from tests.cumo_kernels.layouts import EXPANDED, VIEWS, layouts

ARGUMENTS = ["x_TD", "weight_TK", "w1_EFD", "w2_EOF", "b1_EF", "b2_EO", "residual_TO"]


def make_layer_with_residual(device, **options):
    layer = make_layer(device, **options)
    return {**layer, "residual_TO": torch.randn(6, 17, device=device).to(options.get("dtype", torch.float32))}


@pytest.mark.parametrize("name", ARGUMENTS)
@layouts(*VIEWS)
def test_arguments_may_be_views(layout, name, device):
    layer = make_layer_with_residual(device)
    assert_agrees("moe_mlp", {**layer, name: layout(layer[name])})


@PLAIN_AND_GATED
@layouts(*VIEWS)
def test_weights_may_be_views_in_bfloat16(layout, gated, device):
    layer = make_layer_with_residual(device, gated=gated, dtype=torch.bfloat16)
    views = {name: layout(layer[name]) for name in ("w1_EFD", "w2_EOF")}
    assert_agrees("moe_mlp", {**layer, **views}, gated=gated)


@pytest.mark.parametrize("name", ["x_TD", "residual_TO"])
@layouts(*EXPANDED)
def test_tokens_may_be_expanded(layout, name, device):
    layer = make_layer_with_residual(device)
    wrt = [other for other in ARGUMENTS if other != name]
    assert_agrees("moe_mlp", {**layer, name: layout(layer[name])}, wrt=wrt)


@layouts(*VIEWS, *EXPANDED)
def test_gradient_of_the_output_may_be_a_view(layout, device):
    cotangents = {"out": layout(torch.randn(6, 17, device=device))}
    assert_agrees("moe_mlp", make_layer_with_residual(device), cotangents=cotangents)


# Each changes which kernels the backward launches, or what they are asked to write.
SUBSETS = [
    pytest.param(["x_TD"], id="frozen-parameters-and-gate"),
    pytest.param(["weight_TK"], id="the-gate-only"),
    pytest.param(["x_TD", "weight_TK"], id="frozen-parameters"),
    pytest.param(["w1_EFD"], id="w1-only"),
    pytest.param(["w2_EOF"], id="w2-only"),
    pytest.param(["b1_EF"], id="b1-only"),
    pytest.param(["b2_EO"], id="b2-only"),
    pytest.param(["b1_EF", "b2_EO"], id="biases-only"),
    pytest.param(["w1_EFD", "w2_EOF", "b1_EF", "b2_EO"], id="frozen-tokens-and-gate"),
    pytest.param(["weight_TK", "w1_EFD", "w2_EOF", "b1_EF", "b2_EO"], id="frozen-tokens"),
    pytest.param(["residual_TO"], id="the-residual-only"),
    pytest.param(["x_TD", "residual_TO"], id="tokens-and-residual"),
]


@pytest.mark.parametrize(
    ("sorted_copy", "recompute"),
    [(False, False), (True, False), (True, True)],
    ids=["gathered", "sorted-copy", "sorted-copy-recomputed"],
)
@pytest.mark.parametrize("wrt", SUBSETS)
def test_some_gradients_alone(wrt, sorted_copy, recompute, device, monkeypatch):
    monkeypatch.setattr(tiling, "use_sorted_copy", lambda *_: sorted_copy)
    assert_agrees("moe_mlp", make_layer_with_residual(device), wrt=wrt, recompute=recompute)


def test_gate_gradient_without_the_second_bias(device):
    assert_agrees("moe_mlp", {**make_layer(device), "b2_EO": None}, wrt=["weight_TK"])


def test_arguments_are_left_as_they_were(device):
    layer = make_layer_with_residual(device)
    before = {name: tensor.clone() for name, tensor in layer.items()}
    assert_agrees("moe_mlp", layer)
    assert all(torch.equal(layer[name], tensor) for name, tensor in before.items())
