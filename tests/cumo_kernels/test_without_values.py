# SPDX-License-Identifier: Apache-2.0
"""Tensors that have shapes and no values: the meta device, and FakeTensorMode outside of torch.compile."""

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import cumo_kernels as ck
from cumo.nn import MoEMLP
from cumo_kernels import reference
from tests.cumo_kernels.harness import PLAIN_AND_GATED, make_layer, random_experts

BACKENDS = pytest.mark.parametrize("backend", ["triton", "reference"])


@pytest.fixture
def poisoned_memory():
    """None: there is no memory."""


def moe_mlp(x_TD, layer, **options):
    return ck.moe_mlp(**{**layer, "x_TD": x_TD}, **options)


def in_parts(x_TD, layer):
    """Every operation but the fused ones."""
    routing = ck.topk_gating(x_TD[:, :4], 2, segment=3)
    plan = ck.plan_dispatch(routing.expert_TK, 3)
    h_NF = ck.grouped_gemm(ck.permute(x_TD, plan), layer["w1_EFD"], plan, layer["b1_EF"], "gelu")
    y_NO = ck.grouped_gemm(h_NF, layer["w2_EOF"], plan)
    return *routing, *plan, h_NF, ck.combine(y_NO, routing.weight_TK, plan, x_TD[:, :17])


def linear_gating(x_TD, layer):
    return tuple(ck.linear_topk_gating(x_TD, layer["w1_EFD"][0, :4], 2, probs_dtype=torch.bfloat16))


CALLS = [
    pytest.param(moe_mlp, id="moe_mlp"),
    pytest.param(lambda *inputs: moe_mlp(*inputs, recompute=True), id="moe_mlp-recomputed"),
    pytest.param(in_parts, id="separate-operations"),
    pytest.param(linear_gating, id="linear_topk_gating"),
]


def described(call, inputs):
    """Shape and dtype of each output, and of the gradient of each input that has one."""
    inputs = tree_map_only(torch.Tensor, lambda t: t.detach().requires_grad_(t.is_floating_point()), inputs)
    outputs = tree_leaves(call(*inputs))
    torch.autograd.backward([t.sum() for t in outputs if t.requires_grad])
    grads = [leaf.grad for leaf in tree_leaves(inputs)]
    return [None if t is None else (t.shape, t.dtype, t.stride()) for t in (*outputs, *grads)]


def make_inputs(device, **options):
    layer = make_layer(device, **options)
    return layer.pop("x_TD"), layer


@BACKENDS
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("mode", ["meta", "fake"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("call", CALLS)
def test_shapes_and_dtypes_are_those_of_a_real_call(call, dtype, mode, grad, backend, device):
    inputs = make_inputs(device, dtype=dtype)
    with ck.use_backend("reference"):
        expected = described(call, inputs) if grad else [(t.shape, t.dtype) for t in tree_leaves(call(*inputs))]
    fake_mode = FakeTensorMode()
    place = fake_mode.from_tensor if mode == "fake" else lambda t: t.to("meta")
    with ck.use_backend(backend), fake_mode if mode == "fake" else nullcontext():
        inputs = tree_map_only(torch.Tensor, place, inputs)
        if grad:
            assert described(call, inputs) == expected
        else:
            with torch.no_grad():
                assert [(t.shape, t.dtype) for t in tree_leaves(call(*inputs))] == expected


@BACKENDS
@PLAIN_AND_GATED
@pytest.mark.parametrize("router_dtype", [torch.float32, None], ids=["fp32-router", "router-of-the-module"])
@pytest.mark.parametrize("num_experts", [4, 100], ids=["fused-gating", "more-experts-than-the-fused-gating-takes"])
def test_module_on_the_meta_device(num_experts, router_dtype, gated, backend):
    options = {"num_experts": num_experts, "top_k": 2, "gated": gated, "router_dtype": router_dtype}
    moe = MoEMLP(8, 16, 6, dtype=torch.bfloat16, device="meta", **options)
    x = torch.empty(2, 5, 8, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with ck.use_backend(backend):
        y, routing = moe(x, residual=torch.empty(2, 5, 6, device="meta"))
        (y.sum() + routing.balance_S.sum()).backward()
    assert (y.shape, y.dtype, y.device.type) == ((2, 5, 6), torch.float32, "meta")
    assert routing.expert_TK.shape == (10, 2)
    assert all(leaf.grad.shape == leaf.shape for leaf in (x, *moe.parameters()))


def test_meta_tensors_beside_real_ones_are_refused(device):
    plan = reference.plan_dispatch(random_experts(6, 2, 3, device), 3)
    with pytest.raises(ValueError, match=r"plan.token_N: expected device meta as x_TD"):
        ck.permute(torch.empty(6, 8, device="meta"), plan)
