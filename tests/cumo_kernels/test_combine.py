# SPDX-License-Identifier: Apache-2.0
"""Weighted sum of each token's rows, with every gradient, against the reference."""

import math

import pytest
import torch

import cumo_kernels as ck
from cumo_kernels import reference
from tests.cumo_kernels.harness import (
    EVERY_DTYPE,
    assert_agrees,
    differentiate,
    random_cotangents,
    random_plan,
    run,
)
from tests.cumo_kernels.layouts import EXPANDED, VIEWS, layouts
from tests.numerics import assert_bitwise_equal

# T, K, E, O, ignored experts
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


def make_tensors(device, T=7, K=2, O=24, dtype=torch.float32, weight_dtype=torch.float32, residual=True):
    return {
        "y_NO": torch.randn(T * K, O, device=device).to(dtype),
        "weight_TK": torch.rand(T, K, device=device).add(0.1).to(weight_dtype),
        "residual_TO": torch.randn(T, O, device=device).to(dtype) if residual else None,
    }


@EVERY_DTYPE
@pytest.mark.parametrize("residual", [False, True], ids=["no-residual", "residual"])
@pytest.mark.parametrize(("T", "K", "E", "O", "ignored"), SHAPES)
def test_output_and_gradients_are_as_exact_as_eager(T, K, E, O, ignored, residual, dtype, device):
    tensors = make_tensors(device, T, K, O, dtype, residual=residual)
    assert_agrees("combine", tensors, plan=random_plan(T, K, E, device, ignored))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@EVERY_DTYPE
def test_weights_of_any_dtype(dtype, weight_dtype, device):
    tensors = make_tensors(device, dtype=dtype, weight_dtype=weight_dtype)
    assert_agrees("combine", tensors, plan=random_plan(7, 2, 4, device))


@pytest.mark.parametrize("name", ["y_NO", "weight_TK", "residual_TO"])
@layouts(*VIEWS)
def test_arguments_may_be_views(layout, name, device):
    tensors = make_tensors(device)
    tensors[name] = layout(tensors[name])
    assert_agrees("combine", tensors, plan=random_plan(7, 2, 4, device))


@layouts(*EXPANDED)
def test_residual_may_be_expanded(layout, device):
    tensors = make_tensors(device)
    tensors["residual_TO"] = layout(tensors["residual_TO"])
    assert_agrees("combine", tensors, wrt=["y_NO", "weight_TK"], plan=random_plan(7, 2, 4, device))


@layouts(*VIEWS, *EXPANDED)
def test_gradient_of_the_output_may_be_a_view(layout, device):
    cotangents = {"out": layout(torch.randn(7, 24, device=device))}
    assert_agrees("combine", make_tensors(device), cotangents=cotangents, plan=random_plan(7, 2, 4, device))


@pytest.mark.parametrize("wrt", [["y_NO"], ["weight_TK"], ["residual_TO"]], ids=lambda wrt: wrt[0])
def test_one_gradient_alone(wrt, device):
    assert_agrees("combine", make_tensors(device), wrt=wrt, plan=random_plan(7, 2, 4, device))


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_ignored_choices_are_not_looked_at(backend, device):
    """Neither their rows nor their weights: an expert-parallel caller leaves both uninitialised."""
    tensors, plan = make_tensors(device, T=20), random_plan(20, 2, 4, device, ignored=4)
    cotangents = random_cotangents("combine", tensors, plan=plan)
    tensors["weight_TK"][plan.slot_TK < 0] = 0.0
    expected = differentiate(reference.combine, tensors, list(tensors), cotangents, plan=plan)
    tensors["y_NO"][plan.token_N < 0] = math.nan
    tensors["weight_TK"][plan.slot_TK < 0] = math.nan
    with ck.use_backend(backend):
        actual = differentiate(ck.combine, tensors, list(tensors), cotangents, plan=plan)
    assert (plan.slot_TK < 0).any()
    for name, tensor in actual.items():
        assert not tensor.isnan().any(), name
        torch.testing.assert_close(tensor, expected[name])


def test_two_runs_give_the_same_bits(device):
    tensors, plan = make_tensors(device, T=40, dtype=torch.bfloat16), random_plan(40, 2, 4, device)
    cotangents = random_cotangents("combine", tensors, plan=plan)
    runs = [run("combine", tensors, cotangents, plan=plan) for _ in range(2)]
    assert_bitwise_equal(*runs)
