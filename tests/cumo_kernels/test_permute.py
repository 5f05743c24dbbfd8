# SPDX-License-Identifier: Apache-2.0
"""Tokens into expert-sorted rows, and the gradient back, against the reference."""

import pytest
import torch

import cumo_kernels as ck
from cumo_kernels import reference
from tests.cumo_kernels.harness import EVERY_DTYPE, assert_agrees, random_plan
from tests.cumo_kernels.layouts import EXPANDED, VIEWS, layouts
from tests.numerics import assert_bitwise_equal

# T, K, E, D, ignored experts
SHAPES = [
    pytest.param(0, 2, 4, 24, 0, id="no-tokens"),
    pytest.param(1, 1, 4, 1, 0, id="one-element"),
    pytest.param(7, 2, 4, 25, 0, id="tails-in-both-dimensions"),
    pytest.param(9, 2, 4, 600, 0, id="more-than-one-block-of-columns"),
    pytest.param(64, 2, 4, 64, 0, id="exact-tiles"),
    pytest.param(20, 3, 3, 24, 0, id="every-expert-chosen"),
    pytest.param(21, 2, 4, 24, 3, id="ignored-choices"),
    pytest.param(577, 2, 4, 16, 0, id="an-image-of-577-tokens"),
]


@EVERY_DTYPE
@pytest.mark.parametrize(("T", "K", "E", "D", "ignored"), SHAPES)
def test_rows_and_gradient(T, K, E, D, ignored, dtype, device):
    x_TD = torch.randn(T, D, device=device).to(dtype)
    assert_agrees("permute", {"x_TD": x_TD}, plan=random_plan(T, K, E, device, ignored))


def test_rows_are_copies_bit_for_bit(device):
    x_TD = torch.randn(33, 20, device=device)
    plan = random_plan(33, 2, 4, device, ignored=2)
    with ck.use_backend("triton"):
        actual = ck.permute(x_TD, plan)
    assert_bitwise_equal({"x_ND": actual}, {"x_ND": reference.permute(x_TD, plan)})
    assert not actual[plan.token_N < 0].any()


@layouts(*VIEWS)
def test_tokens_may_be_a_view(layout, device):
    assert_agrees("permute", {"x_TD": layout(torch.randn(7, 24, device=device))}, plan=random_plan(7, 2, 4, device))


@layouts(*VIEWS, *EXPANDED)
def test_gradient_of_the_rows_may_be_a_view(layout, device):
    cotangent = layout(torch.randn(14, 24, device=device))
    tensors = {"x_TD": torch.randn(7, 24, device=device)}
    assert_agrees("permute", tensors, cotangents={"out": cotangent}, plan=random_plan(7, 2, 4, device, ignored=2))


def test_nan_in_a_token_stays_in_its_rows(device):
    x_TD = torch.randn(9, 24, device=device)
    x_TD[4] = float("nan")
    plan = random_plan(9, 2, 4, device, ignored=2)
    with ck.use_backend("triton"):
        x_ND = ck.permute(x_TD, plan)
    assert torch.equal(x_ND.isnan().any(dim=1), plan.token_N == 4)
