# SPDX-License-Identifier: Apache-2.0
"""Gating with the router's linear layer inside, with both gradients, against the reference."""

import pytest
import torch

import cumo_kernels as ck
from cumo_kernels import tiling
from cumo_kernels.tiling import LinearGatingTile
from tests.cumo_kernels.harness import assert_agrees, random_cotangents, run
from tests.cumo_kernels.layouts import EXPANDED, VIEWS, layouts
from tests.numerics import assert_bitwise_equal

# T, D, E, K, segment
SHAPES = [
    pytest.param(0, 24, 4, 2, None, id="no-tokens"),
    pytest.param(0, 24, 4, 2, 577, id="no-segments"),
    pytest.param(1, 24, 4, 2, None, id="one-token"),
    pytest.param(7, 1, 4, 2, None, id="one-column"),
    pytest.param(7, 25, 1, 1, None, id="one-expert"),
    pytest.param(9, 25, 3, 3, 3, id="every-one-of-three-experts"),
    pytest.param(210, 24, 4, 2, 70, id="segments-of-two-blocks-with-a-tail"),
    pytest.param(128, 256, 8, 2, 64, id="exact-tiles"),
    pytest.param(33, 300, 60, 4, 11, id="sixty-experts-and-three-steps-over-the-columns"),
    pytest.param(33, 24, 64, 8, None, id="the-most-experts-the-kernel-takes"),
    pytest.param(3 * 577, 24, 4, 2, 577, id="three-images-of-577-tokens"),
]

DTYPES = [
    pytest.param(torch.float32, torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, torch.float32, id="bf16-tokens-fp32-router"),
    pytest.param(torch.float32, torch.bfloat16, id="fp32-tokens-bf16-router"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, torch.float32, id="fp16-tokens-fp32-router"),
]


def make_tensors(device, T=21, D=24, E=4, x_dtype=torch.float32, gate_dtype=torch.float32):
    return {
        "x_TD": torch.randn(T, D, device=device).to(x_dtype),
        "gate_ED": (torch.randn(E, D, device=device) * D**-0.5).to(gate_dtype),
    }


@pytest.mark.parametrize(("x_dtype", "gate_dtype"), DTYPES)
@pytest.mark.parametrize(("T", "D", "E", "K", "segment"), SHAPES)
def test_routing_and_gradients_are_as_exact_as_eager(T, D, E, K, segment, x_dtype, gate_dtype, device):
    tensors = make_tensors(device, T, D, E, x_dtype, gate_dtype)
    # the logits are in float32 whatever the inputs, so nothing but the gradients is rounded to their dtypes
    assert_agrees("linear_topk_gating", tensors, rounded_to=torch.float32, top_k=K, segment=segment)


@pytest.mark.parametrize("probs_dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "not-normalized"])
def test_rounded_probabilities(probs_dtype, normalize, device):
    constants = {"top_k": 2, "normalize": normalize, "probs_dtype": probs_dtype}
    assert_agrees("linear_topk_gating", make_tensors(device, T=100), rounded_to=probs_dtype, **constants)


def test_more_blocks_than_tokens_in_one(device, monkeypatch):
    tile = LinearGatingTile(BLOCK_T=16, BLOCK_D=16)
    monkeypatch.setattr(tiling, "linear_gating_tile", lambda *_: tile)
    assert_agrees("linear_topk_gating", make_tensors(device, T=150, D=40), top_k=2, segment=50)


@pytest.mark.parametrize("name", ["x_TD", "gate_ED"])
@layouts(*VIEWS)
def test_arguments_may_be_views(layout, name, device):
    tensors = make_tensors(device)
    assert_agrees("linear_topk_gating", {**tensors, name: layout(tensors[name])}, top_k=2, segment=7)


@layouts(*EXPANDED)
def test_gradient_of_the_weights_may_be_expanded(layout, device):
    tensors = make_tensors(device)
    cotangents = random_cotangents("linear_topk_gating", tensors, top_k=2)
    cotangents["weight_TK"] = layout(cotangents["weight_TK"])
    assert_agrees("linear_topk_gating", tensors, cotangents=cotangents, top_k=2)


@pytest.mark.parametrize("wrt", [["x_TD"], ["gate_ED"]], ids=lambda wrt: wrt[0])
def test_one_gradient_alone(wrt, device):
    assert_agrees("linear_topk_gating", make_tensors(device), wrt=wrt, top_k=2)


@pytest.mark.parametrize("used", ["weight_TK", "balance_S", "z_S", "mean_probs_SE"])
def test_gradients_where_only_one_output_is_used(used, device):
    tensors = make_tensors(device)
    cotangents = random_cotangents("linear_topk_gating", tensors, top_k=2)
    assert_agrees("linear_topk_gating", tensors, cotangents={used: cotangents[used]}, top_k=2)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_autocast_leaves_the_router_in_float32(backend, device):
    tensors = make_tensors(device)
    with ck.use_backend(backend):
        expected = ck.linear_topk_gating(**tensors, top_k=2)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            actual = ck.linear_topk_gating(**tensors, top_k=2)
    assert_bitwise_equal(actual._asdict(), expected._asdict())


def test_backward_within_autocast_is_in_float32_too(device):
    tensors = make_tensors(device)
    cotangents = random_cotangents("linear_topk_gating", tensors, top_k=2)
    expected = run("linear_topk_gating", tensors, cotangents, top_k=2)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = run("linear_topk_gating", tensors, cotangents, top_k=2)
    assert_bitwise_equal(actual, expected)


def test_two_runs_give_the_same_bits(device):
    tensors = make_tensors(device, T=140, x_dtype=torch.bfloat16)
    cotangents = random_cotangents("linear_topk_gating", tensors, top_k=2)
    runs = [run("linear_topk_gating", tensors, cotangents, top_k=2) for _ in range(2)]
    assert_bitwise_equal(*runs)
