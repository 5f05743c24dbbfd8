# SPDX-License-Identifier: Apache-2.0
"""The fused layer against the reference: shapes, routings, dtypes, activations, options."""

import pytest
import torch

import cumo_kernels as ck
from tests.cumo_kernels.harness import (
    FP32_AND_BF16,
    PLAIN_AND_GATED,
    assert_agrees,
    make_layer,
    random_cotangents,
    random_experts,
    run,
)
from tests.numerics import assert_bitwise_equal

# T, K, E, D, F, O
SHAPES = [
    pytest.param((0, 2, 4, 24, 40, 25), id="no-tokens"),
    pytest.param((1, 1, 3, 24, 40, 25), id="one-token-so-two-of-three-experts-are-empty"),
    pytest.param((9, 1, 1, 24, 40, 25), id="one-expert-is-a-dense-layer"),
    pytest.param((1, 2, 4, 1, 1, 1), id="widths-of-one-which-triton-specialises"),
    pytest.param((7, 2, 4, 0, 24, 9), id="no-input-width"),
    pytest.param((7, 2, 4, 16, 0, 9), id="no-hidden-width"),
    pytest.param((7, 2, 4, 16, 24, 0), id="no-output-width"),
    pytest.param((7, 2, 4, 25, 41, 9), id="tails-in-every-dimension-and-rows-not-16-byte-aligned"),
    pytest.param((7, 3, 3, 24, 40, 24), id="every-expert-chosen-by-every-token"),
    pytest.param((32, 2, 8, 32, 32, 64), id="exact-tiles-in-the-widths-and-eight-experts"),
    pytest.param((70, 2, 2, 40, 40, 33), id="several-tiles-in-every-dimension-and-a-part-panel"),
    pytest.param((33, 4, 60, 16, 20, 12), id="more-experts-than-rows-in-a-tile", marks=pytest.mark.slow),
    pytest.param((577, 2, 4, 16, 24, 8), id="an-image-of-577-tokens", marks=pytest.mark.slow),
]


@FP32_AND_BF16
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_as_exact_as_eager(shape, dtype, device):
    assert_agrees("moe_mlp", make_layer(device, *shape, dtype=dtype))


@PLAIN_AND_GATED
@pytest.mark.parametrize("activation", ck.ACTIVATIONS)
def test_every_activation(activation, gated, device):
    assert_agrees("moe_mlp", make_layer(device, gated=gated), activation=activation, gated=gated)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("activation", "gated"), [("quick_gelu", False), ("silu", True)], ids=["clip", "mixtral"])
def test_layers_of_the_models_in_16_bits(activation, gated, dtype, device):
    layer = make_layer(device, T=20, gated=gated, dtype=dtype)
    assert_agrees("moe_mlp", layer, activation=activation, gated=gated)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@FP32_AND_BF16
def test_gate_weights_of_another_dtype(dtype, weight_dtype, device):
    assert_agrees("moe_mlp", make_layer(device, dtype=dtype, weight_dtype=weight_dtype))


def all_to(expert: int, T: int = 40, K: int = 1) -> torch.Tensor:
    return torch.full((T, K), expert, dtype=torch.int32)


ROUTINGS = [
    pytest.param(lambda: all_to(0), id="all-to-the-first-expert"),
    pytest.param(lambda: all_to(2), id="all-to-the-last-expert"),
    pytest.param(lambda: random_experts(40, 2, 3, torch.device("cpu"), avoid=0), id="first-expert-empty"),
    pytest.param(lambda: random_experts(40, 2, 3, torch.device("cpu"), avoid=1), id="inner-expert-empty"),
    pytest.param(lambda: random_experts(40, 2, 3, torch.device("cpu"), avoid=2), id="last-expert-empty"),
    pytest.param(lambda: all_to(1, T=9, K=3), id="one-expert-named-thrice-by-a-token"),
    pytest.param(lambda: random_experts(20, 2, 3, torch.device("cpu")).long(), id="int64-ids"),
    pytest.param(lambda: random_experts(20, 2, 5, torch.device("cpu")), id="ids-from-E-on-are-ignored"),
    pytest.param(lambda: random_experts(20, 2, 7, torch.device("cpu")) - 2, id="negative-and-large-ids-are-ignored"),
    pytest.param(lambda: all_to(-1), id="all-ids-are-ignored"),
    pytest.param(lambda: all_to(1).long() + 2**32, id="int64-ids-that-would-be-in-range-if-cut-to-32-bits"),
    pytest.param(lambda: random_experts(2, 20, 20, torch.device("cpu")).T % 3, id="ids-with-transposed-strides"),
]


@PLAIN_AND_GATED
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routing(routing, gated, device):
    expert_TK = routing().to(device)
    T, K = expert_TK.shape
    assert_agrees("moe_mlp", make_layer(device, T, K, gated=gated, expert_TK=expert_TK), gated=gated)


@PLAIN_AND_GATED
@pytest.mark.parametrize("missing", [("b1_EF",), ("b2_EO",), ("b1_EF", "b2_EO")], ids=["b1", "b2", "both"])
def test_missing_biases(missing, gated, device):
    layer = make_layer(device, gated=gated)
    assert_agrees("moe_mlp", {**layer, **dict.fromkeys(missing)}, gated=gated)


@FP32_AND_BF16
def test_residual_is_added_before_the_one_rounding(dtype, device):
    layer = make_layer(device, dtype=dtype)
    assert_agrees("moe_mlp", {**layer, "residual_TO": torch.randn(6, 17, device=device).to(dtype)})


@FP32_AND_BF16
@PLAIN_AND_GATED
def test_recomputing_the_pre_activation_changes_no_bit(gated, dtype, device):
    layer = make_layer(device, T=20, gated=gated, dtype=dtype)
    cotangents = random_cotangents("moe_mlp", layer, gated=gated)
    saved = run("moe_mlp", layer, cotangents, gated=gated, recompute=False)
    recomputed = run("moe_mlp", layer, cotangents, gated=gated, recompute=True)
    assert_bitwise_equal(recomputed, saved)


@FP32_AND_BF16
def test_two_runs_give_the_same_bits(dtype, device):
    layer = make_layer(device, T=40, dtype=dtype)
    cotangents = random_cotangents("moe_mlp", layer)
    assert_bitwise_equal(run("moe_mlp", layer, cotangents), run("moe_mlp", layer, cotangents))


def test_a_second_backward_through_the_same_graph_gives_the_same_gradients(device):
    layer = make_layer(device)
    x_TD = layer["x_TD"].requires_grad_()
    with ck.use_backend("triton"):
        y_TO = ck.moe_mlp(**layer)
    dy_TO = torch.randn_like(y_TO)
    first, second = (torch.autograd.grad(y_TO, x_TD, dy_TO, retain_graph=True)[0] for _ in range(2))
    assert_bitwise_equal({"dx": second}, {"dx": first})


def test_no_gradient_is_recorded_without_one_to_compute(device):
    with ck.use_backend("triton"):
        assert not ck.moe_mlp(**make_layer(device)).requires_grad
