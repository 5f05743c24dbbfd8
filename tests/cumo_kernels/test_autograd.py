# SPDX-License-Identifier: Apache-2.0
"""Autograd and autocast around the operations: what is supported, and what is refused by name."""

import pytest
import torch

import cumo_kernels as ck
from cumo_kernels.kernels.launch import record_launches
from tests.cumo_kernels.harness import make_layer, random_plan

BACKENDS = pytest.mark.parametrize("backend", ["triton", "reference"])


def gating(device):
    logits_TE = torch.randn(6, 3, device=device, requires_grad=True)
    return ck.topk_gating(logits_TE, 2).weight_TK, logits_TE


def linear_gating(device):
    x_TD, gate_ED = torch.randn(6, 8, device=device, requires_grad=True), torch.randn(3, 8, device=device)
    return ck.linear_topk_gating(x_TD, gate_ED, 2).weight_TK, x_TD


def permute(device):
    x_TD = torch.randn(6, 8, device=device, requires_grad=True)
    return ck.permute(x_TD, random_plan(6, 2, 3, device)), x_TD


def grouped_gemm(device):
    x_ND = torch.randn(12, 8, device=device, requires_grad=True)
    return ck.grouped_gemm(x_ND, torch.randn(3, 5, 8, device=device), random_plan(6, 2, 3, device)), x_ND


def combine(device):
    y_NO = torch.randn(12, 8, device=device, requires_grad=True)
    weight_TK = torch.randn(6, 2, device=device, requires_grad=True)
    return ck.combine(y_NO, weight_TK, random_plan(6, 2, 3, device)), y_NO


def moe_mlp(device):
    layer = make_layer(device)
    return ck.moe_mlp(**{**layer, "x_TD": layer["x_TD"].requires_grad_()}), layer["x_TD"]


@pytest.mark.parametrize("call", [gating, linear_gating, permute, grouped_gemm, combine, moe_mlp])
def test_second_derivative_is_refused_by_the_kernels(call, device):
    with ck.use_backend("triton"):
        output, leaf = call(device)
    (grad,) = torch.autograd.grad(output, leaf, torch.ones_like(output, requires_grad=True), create_graph=True)
    message = r"\w+: double backward is not implemented on the triton backend; use_backend\('reference'\) diff"
    with pytest.raises(RuntimeError, match=message):
        grad.sum().backward()


def test_pre_activation_is_stored_only_for_a_gradient(device):
    plan = random_plan(6, 2, 3, device)
    x_ND, w_EFD = torch.randn(12, 8, device=device), torch.randn(3, 5, 8, device=device)
    wanted = w_EFD.clone().requires_grad_()
    with ck.use_backend("triton"), record_launches() as launches:
        ck.grouped_gemm(x_ND, w_EFD, plan, activation="gelu")
        ck.grouped_gemm(x_ND, wanted, plan)
        with torch.no_grad():
            ck.grouped_gemm(x_ND, wanted, plan, activation="gelu")
        ck.grouped_gemm(x_ND, wanted, plan, activation="gelu")
    arguments = [dict(zip(launched.kernel.arg_names, launched.args, strict=False)) for launched in launches]
    assert [a["z_ptr"] is not None for a in arguments] == [False, False, False, True]


@BACKENDS
@pytest.mark.parametrize("used", ["weight_TK", "balance_S", "z_S", "mean_probs_SE"])
def test_unused_outputs_of_the_gating_do_not_stop_the_gradient(used, backend, device):
    logits_TE = torch.randn(6, 3, device=device, requires_grad=True)
    with ck.use_backend(backend):
        output = getattr(ck.topk_gating(logits_TE, 2), used)
    output.backward(torch.randn_like(output))
    assert logits_TE.grad.isfinite().all()
    assert logits_TE.grad.any()


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_that_of_the_parameters(dtype, backend, device):
    layer = {n: t.requires_grad_(t.is_floating_point()) for n, t in make_layer(device).items()}
    leaves = [t for t in layer.values() if t.requires_grad]
    with ck.use_backend(backend):
        with torch.autocast(device.type, dtype=dtype):
            y_TO = ck.moe_mlp(**layer)
        cast = {n: t.to(dtype) if t.is_floating_point() and n != "weight_TK" else t for n, t in layer.items()}
        expected = ck.moe_mlp(**cast)
    assert y_TO.dtype == dtype
    assert torch.equal(y_TO, expected)
    dy_TO = torch.randn_like(y_TO)
    grads, expected_grads = (torch.autograd.grad(y, leaves, dy_TO) for y in (y_TO, expected))
    for leaf, grad, expected_grad in zip(leaves, grads, expected_grads, strict=True):
        assert grad.dtype == leaf.dtype == torch.float32
        assert torch.equal(grad, expected_grad)


@BACKENDS
def test_autocast_of_the_grouped_gemm(backend, device):
    plan = random_plan(6, 2, 3, device)
    x_ND, w_EFD = torch.randn(12, 8, device=device), torch.randn(3, 5, 8, device=device, requires_grad=True)
    with ck.use_backend(backend), torch.autocast(device.type, dtype=torch.bfloat16):
        h_NF = ck.grouped_gemm(x_ND, w_EFD, plan)
    assert h_NF.dtype == torch.bfloat16
    h_NF.sum().backward()
    assert w_EFD.grad.dtype == torch.float32


@BACKENDS
def test_autocast_leaves_float64_alone(backend, device):
    if backend == "triton":
        pytest.skip("the kernels do not take float64")
    layer = {n: t.double() if t.is_floating_point() else t for n, t in make_layer(device).items()}
    with ck.use_backend(backend), torch.autocast(device.type, dtype=torch.bfloat16):
        assert ck.moe_mlp(**layer).dtype == torch.float64


def test_backward_runs_on_the_backend_of_the_forward(device):
    layer = make_layer(device)
    with ck.use_backend("triton"):
        y_TO = ck.moe_mlp(**{**layer, "x_TD": layer["x_TD"].requires_grad_()})
    with ck.use_backend("reference"), record_launches() as launches:
        y_TO.sum().backward()
    assert launches


@BACKENDS
def test_activation_checkpointing_gives_the_same_gradients(backend, device):
    layer = {n: t.requires_grad_(t.is_floating_point()) for n, t in make_layer(device).items()}
    leaves = [t for t in layer.values() if t.requires_grad]
    dy_TO = torch.randn(6, 17, device=device)
    with ck.use_backend(backend):
        expected = torch.autograd.grad(ck.moe_mlp(**layer), leaves, dy_TO)
        y_TO = torch.utils.checkpoint.checkpoint(lambda: ck.moe_mlp(**layer), use_reentrant=False)
        actual = torch.autograd.grad(y_TO, leaves, dy_TO)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
