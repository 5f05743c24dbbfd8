# SPDX-License-Identifier: Apache-2.0
"""Gating and its auxiliary losses, with the gradient of the logits, against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cumo_kernels as ck
from cumo_kernels import reference, tiling
from cumo_kernels.tiling import GatingTile
from tests import oracles
from tests.cumo_kernels.harness import EVERY_DTYPE, assert_agrees, random_cotangents, run
from tests.cumo_kernels.layouts import (
    EXPANDED,
    VIEWS,
    columns_of_a_wider_tensor,
    every_other_element,
    layouts,
    part_of_a_padded_tensor,
)
from tests.numerics import assert_bitwise_equal

# T, E, K, segment
SHAPES = [
    pytest.param(0, 4, 2, None, id="no-tokens"),
    pytest.param(0, 4, 2, 577, id="no-segments"),
    pytest.param(1, 4, 2, None, id="one-token"),
    pytest.param(7, 1, 1, None, id="one-expert"),
    pytest.param(7, 2, 1, None, id="one-of-two-experts"),
    pytest.param(7, 3, 3, None, id="every-one-of-three-experts"),
    pytest.param(12, 4, 2, 1, id="segments-of-one-token"),
    pytest.param(12, 4, 2, 12, id="one-segment-named"),
    pytest.param(3 * 577, 4, 2, 577, id="three-images-of-577-tokens"),
    pytest.param(21, 8, 2, 7, id="segments-that-are-no-multiple-of-a-block"),
    pytest.param(33, 60, 4, 11, id="sixty-experts"),
    pytest.param(33, 60, 60, None, id="every-one-of-sixty-experts"),
    pytest.param(34, 256, 8, 17, id="256-experts"),
    pytest.param(6, 1024, 10, 3, id="the-most-experts-the-kernel-takes"),
]

# The tiles of larger inputs, forced upon small ones.
TILES = [
    pytest.param(GatingTile(BLOCK_T=4, ONE_PROGRAM=True, num_warps=4), id="one-program-walks-several-blocks"),
    pytest.param(GatingTile(BLOCK_T=4, ONE_PROGRAM=False, num_warps=4), id="losses-in-a-second-launch"),
]

NORMALIZE = pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "not-normalized"])


@EVERY_DTYPE
@NORMALIZE
@pytest.mark.parametrize(("T", "E", "K", "segment"), SHAPES)
def test_routing_losses_and_gradient_are_as_exact_as_eager(T, E, K, segment, normalize, dtype, device):
    logits_TE = torch.randn(T, E, device=device).to(dtype)
    assert_agrees("topk_gating", {"logits_TE": logits_TE}, top_k=K, segment=segment, normalize=normalize)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("T", "E", "K", "segment"), SHAPES)
def test_segments_of_several_blocks(T, E, K, segment, tile, device, monkeypatch):
    monkeypatch.setattr(tiling, "gating_tile", lambda *_: tile)
    if segment == 577:
        T, segment = T // 577 * 57, 57  # no more blocks than the interpreter can do quickly
    assert_agrees("topk_gating", {"logits_TE": torch.randn(T, E, device=device)}, top_k=K, segment=segment)


def test_more_blocks_than_one_step_of_the_second_launch_adds_up(device, monkeypatch):
    monkeypatch.setattr(tiling, "gating_tile", lambda *_: GatingTile(BLOCK_T=1, ONE_PROGRAM=False, num_warps=4))
    logits_TE = torch.randn(40, 256, device=device)  # with 256 experts, a step adds up 16 blocks
    assert_agrees("topk_gating", {"logits_TE": logits_TE}, top_k=2, segment=20)


@NORMALIZE
@pytest.mark.parametrize("probs_dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@EVERY_DTYPE
def test_rounded_probabilities(dtype, probs_dtype, normalize, device):
    constants = {"top_k": 2, "normalize": normalize, "probs_dtype": probs_dtype}
    tensors = {"logits_TE": torch.randn(100, 4, device=device).to(dtype)}
    actual = assert_agrees("topk_gating", tensors, rounded_to=probs_dtype, **constants)
    eager = reference.topk_gating(tensors["logits_TE"], **constants)
    # rounded where eager rounds: neither a choice nor a bit of a weight differs
    names = ("weight_TK", "expert_TK")
    assert_bitwise_equal({n: actual[n] for n in names}, {n: getattr(eager, n) for n in names})


@settings(max_examples=40)
@given(st.data())
def test_ties_go_to_the_lowest_index(device, data):
    E = data.draw(st.integers(1, 9))
    row = st.lists(st.integers(0, 2), min_size=E, max_size=E)
    logits_TE = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=8)), dtype=torch.float32)
    K = data.draw(st.integers(1, E))
    with ck.use_backend("triton"):
        routing = ck.topk_gating(logits_TE.to(device), K)
    routing.validate(E)
    assert torch.equal(routing.expert_TK.cpu(), oracles.gating(logits_TE, K)["expert_TK"])


def test_logits_far_apart_neither_overflow_nor_lose_the_order(device):
    logits_TE = torch.tensor([[1e4, -1e4, 0.0, 9e3], [-1e9, 1e9, 0.0, 1.0], [88.0, 89.0, 90.0, -90.0]], device=device)
    assert_agrees("topk_gating", {"logits_TE": logits_TE}, top_k=3)


@layouts(*VIEWS)
def test_logits_may_be_a_view(layout, device):
    assert_agrees("topk_gating", {"logits_TE": layout(torch.randn(21, 4, device=device))}, top_k=2, segment=7)


@pytest.mark.parametrize("name", ["weight_TK", "balance_S", "z_S", "mean_probs_SE"])
@layouts(columns_of_a_wider_tensor, part_of_a_padded_tensor, every_other_element, *EXPANDED)
def test_gradients_of_the_outputs_may_be_views(layout, name, device):
    tensors = {"logits_TE": torch.randn(21, 4, device=device)}
    cotangents = random_cotangents("topk_gating", tensors, top_k=2, segment=7)
    cotangents[name] = layout(cotangents[name])
    assert_agrees("topk_gating", tensors, cotangents=cotangents, top_k=2, segment=7)


@NORMALIZE
@pytest.mark.parametrize(
    "used",
    [["weight_TK"], ["balance_S"], ["z_S"], ["mean_probs_SE"], ["weight_TK", "z_S"], ["balance_S", "mean_probs_SE"]],
    ids="-".join,
)
def test_gradient_where_only_some_outputs_are_used(used, normalize, device):
    tensors = {"logits_TE": torch.randn(21, 4, device=device)}
    constants = {"top_k": 2, "segment": 7, "normalize": normalize}
    cotangents = random_cotangents("topk_gating", tensors, **constants)
    assert_agrees("topk_gating", tensors, cotangents={name: cotangents[name] for name in used}, **constants)


def test_selection_and_shares_carry_no_gradient(device):
    logits_TE = torch.randn(7, 4, device=device, requires_grad=True)
    with ck.use_backend("triton"):
        routing = ck.topk_gating(logits_TE, 2)
    assert not routing.expert_TK.requires_grad
    assert routing.weight_TK.requires_grad
    assert routing.balance_S.requires_grad
    assert routing.z_S.requires_grad
    assert routing.mean_probs_SE.requires_grad


@pytest.mark.parametrize("tile", TILES)
def test_two_runs_give_the_same_bits(tile, device, monkeypatch):
    monkeypatch.setattr(tiling, "gating_tile", lambda *_: tile)
    tensors = {"logits_TE": torch.randn(60, 8, device=device)}
    cotangents = random_cotangents("topk_gating", tensors, top_k=2, segment=20)
    runs = [run("topk_gating", tensors, cotangents, top_k=2, segment=20) for _ in range(2)]
    assert_bitwise_equal(*runs)
