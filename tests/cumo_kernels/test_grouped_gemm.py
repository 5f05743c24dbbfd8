# SPDX-License-Identifier: Apache-2.0
"""Grouped GEMM with bias and activation, with every gradient, against the reference."""

import pytest
import torch

import cumo_kernels as ck
from tests.cumo_kernels.harness import (
    FP32_AND_BF16,
    assert_agrees,
    random_cotangents,
    random_experts,
    random_plan,
    run,
)
from tests.cumo_kernels.layouts import EXPANDED, VIEWS, layouts
from tests.numerics import assert_bitwise_equal

# N, E, D, F, ignored experts
SHAPES = [
    pytest.param(0, 4, 24, 40, 0, id="no-rows"),
    pytest.param(1, 3, 1, 1, 0, id="one-element"),
    pytest.param(13, 4, 0, 40, 0, id="no-input-width"),
    pytest.param(13, 4, 24, 0, 0, id="no-output-width"),
    pytest.param(13, 4, 25, 41, 0, id="tails-in-every-dimension"),
    pytest.param(64, 2, 32, 64, 0, id="exact-tiles"),
    pytest.param(140, 2, 40, 33, 0, id="several-tiles-in-every-dimension-and-a-part-panel"),
    pytest.param(70, 4, 24, 40, 3, id="more-than-a-tile-of-ignored-rows"),
    pytest.param(3, 60, 16, 24, 0, id="more-experts-than-rows"),
]


def make_tensors(device, N=13, E=4, D=24, F=40, dtype=torch.float32):
    return {
        "x_ND": torch.randn(N, D, device=device).to(dtype),
        "w_EFD": (torch.randn(E, F, D, device=device) * max(D, 1) ** -0.5).to(dtype),
        "bias_EF": torch.randn(E, F, device=device).to(dtype),
    }


@FP32_AND_BF16
@pytest.mark.parametrize("activation", [None, "gelu"], ids=["linear", "gelu"])
@pytest.mark.parametrize(("N", "E", "D", "F", "ignored"), SHAPES)
def test_output_and_gradients_are_as_exact_as_eager(N, E, D, F, ignored, activation, dtype, device):
    plan = random_plan(N, 1, E, device, ignored)
    assert_agrees("grouped_gemm", make_tensors(device, N, E, D, F, dtype), plan=plan, activation=activation)


@pytest.mark.parametrize("activation", ck.ACTIVATIONS)
def test_every_activation(activation, device):
    assert_agrees("grouped_gemm", make_tensors(device), plan=random_plan(13, 1, 4, device), activation=activation)


@pytest.mark.parametrize(("least", "most"), [(-8.0, -4.0), (-1.0, 1.0), (2.0, 6.0), (8.0, 16.0)])
@pytest.mark.parametrize("activation", ck.ACTIVATIONS)
def test_activations_and_their_derivatives_on_a_range(activation, least, most, device):
    """A weight of one and a width of one: the output is f(x), its gradient f'(x)."""
    tensors = {
        "x_ND": torch.linspace(least, most, 101, device=device).unsqueeze(1),
        "w_EFD": torch.ones(1, 1, 1, device=device),
        "bias_EF": None,
    }
    cotangents = {"out": torch.ones_like(tensors["x_ND"])}
    plan = random_plan(101, 1, 1, device)
    assert_agrees("grouped_gemm", tensors, wrt=["x_ND"], cotangents=cotangents, plan=plan, activation=activation)


@pytest.mark.parametrize("activation", [None, "gelu"], ids=["linear", "gelu"])
def test_float16(activation, device):
    tensors = make_tensors(device, dtype=torch.float16)
    assert_agrees("grouped_gemm", tensors, plan=random_plan(13, 1, 4, device), activation=activation)


@pytest.mark.parametrize("activation", [None, "silu"], ids=["linear", "silu"])
def test_no_bias(activation, device):
    tensors = {**make_tensors(device), "bias_EF": None}
    assert_agrees("grouped_gemm", tensors, plan=random_plan(13, 1, 4, device), activation=activation)


@pytest.mark.parametrize("avoid", [0, 2, 3], ids=["first", "inner", "last"])
def test_an_expert_without_rows_gets_zero_gradients(avoid, device):
    plan = ck.plan_dispatch(random_experts(13, 1, 4, device, avoid), 4)
    actual = assert_agrees("grouped_gemm", make_tensors(device), plan=plan)
    assert not actual["dw_EFD"][avoid].any()
    assert not actual["dbias_EF"][avoid].any()


def test_rows_of_no_expert_are_zero(device):
    plan = random_plan(70, 1, 2, device, ignored=2)
    actual = assert_agrees("grouped_gemm", make_tensors(device, N=70, E=2), plan=plan, activation="gelu")
    ignored_N = plan.token_N < 0
    assert ignored_N.any()
    assert not actual["out"][ignored_N].any()
    assert not actual["dx_ND"][ignored_N].any()


@pytest.mark.parametrize("name", ["x_ND", "w_EFD", "bias_EF"])
@layouts(*VIEWS)
def test_arguments_may_be_views(layout, name, device):
    tensors = make_tensors(device)
    tensors[name] = layout(tensors[name])
    assert_agrees("grouped_gemm", tensors, plan=random_plan(13, 1, 4, device))


@pytest.mark.parametrize("activation", [None, "gelu"], ids=["linear", "gelu"])
@layouts(*VIEWS, *EXPANDED)
def test_gradient_of_the_output_may_be_a_view(layout, activation, device):
    cotangents = {"out": layout(torch.randn(13, 40, device=device))}
    plan = random_plan(13, 1, 4, device)
    assert_agrees("grouped_gemm", make_tensors(device), cotangents=cotangents, plan=plan, activation=activation)


@pytest.mark.parametrize("activation", [None, "gelu"], ids=["linear", "gelu"])
@pytest.mark.parametrize("wrt", [["x_ND"], ["w_EFD"], ["bias_EF"], ["x_ND", "bias_EF"]], ids="-".join)
def test_some_gradients_alone(wrt, activation, device):
    plan = random_plan(13, 1, 4, device)
    assert_agrees("grouped_gemm", make_tensors(device), wrt=wrt, plan=plan, activation=activation)


def test_two_runs_give_the_same_bits(device):
    tensors, plan = make_tensors(device, dtype=torch.bfloat16), random_plan(13, 1, 4, device)
    cotangents = random_cotangents("grouped_gemm", tensors, plan=plan, activation="gelu")
    runs = [run("grouped_gemm", tensors, cotangents, plan=plan, activation="gelu") for _ in range(2)]
    assert_bitwise_equal(*runs)
