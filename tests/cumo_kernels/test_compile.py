# SPDX-License-Identifier: Apache-2.0
"""The operations under `torch.compile`: registered as PyTorch wants it, traced whole, and equal to eager mode."""

import pytest
import torch

import cumo_kernels as ck
from cumo_kernels import reference
from cumo_kernels.kernels.launch import record_launches
from tests.cumo_kernels.harness import PLAIN_AND_GATED, make_layer, random_plan
from tests.numerics import assert_bitwise_equal, relative_error

# Dynamo makes one to trace `torch.autograd.Function.apply`, of which the reference is built.
pytestmark = pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")

BACKENDS = pytest.mark.parametrize("backend", ["triton", "reference"])
OPS = torch.ops.cumo_kernels


@pytest.fixture
def poisoned_memory():
    """None: a patched `torch.empty` is no longer the one that the compiler knows."""


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


def gating_arguments(device):
    return torch.randn(12, 4, device=device), 2, 4, True, torch.float32


def linear_gating_arguments(device):
    return torch.randn(12, 8, device=device), torch.randn(4, 8, device=device), 2, 4, True, torch.float32


def permute_arguments(device):
    plan = random_plan(6, 2, 3, device)
    return torch.randn(6, 8, device=device), plan.token_N, plan.slot_TK


def combine_arguments(device):
    plan = random_plan(6, 2, 3, device)
    y_NO, weight_TK, residual_TO = (torch.randn(shape, device=device) for shape in ((12, 8), (6, 2), (6, 8)))
    return y_NO, weight_TK, residual_TO, plan.token_N, plan.route_N, plan.slot_TK


def grouped_gemm_arguments(device):
    plan = random_plan(6, 2, 3, device)
    x_ND, w_EFD, bias_EF = (torch.randn(shape, device=device) for shape in ((12, 8), (3, 10, 8), (3, 10)))
    return x_ND, w_EFD, bias_EF, plan.offset_E1, "gelu", True


def moe_mlp_arguments(device, save_z=True):
    layer = make_layer(device)
    plan = reference.plan_dispatch(layer.pop("expert_TK"), 3)
    return *layer.values(), torch.randn(6, 17, device=device), *plan, "silu", False, save_z


def leaves(arguments):
    return tuple(t.requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in arguments)


OPERATORS = [
    pytest.param(OPS.topk_gating, gating_arguments, id="topk_gating"),
    pytest.param(OPS.linear_topk_gating, linear_gating_arguments, id="linear_topk_gating"),
    pytest.param(OPS.permute, permute_arguments, id="permute"),
    pytest.param(OPS.combine, combine_arguments, id="combine"),
    pytest.param(OPS.grouped_gemm, grouped_gemm_arguments, id="grouped_gemm"),
    pytest.param(OPS.moe_mlp, moe_mlp_arguments, id="moe_mlp"),
    pytest.param(OPS.moe_mlp, lambda device: moe_mlp_arguments(device, False), id="moe_mlp-recomputed"),
]


@pytest.mark.parametrize(("operator", "arguments"), OPERATORS)
def test_operator_is_registered_as_pytorch_wants_it(operator, arguments, device):
    """Schema, autograd, fake implementation, and tracing forward and backward with dynamic shapes."""
    torch.library.opcheck(operator, leaves(arguments(device)))


def test_plan_operator_is_registered_as_pytorch_wants_it(device):
    expert_TK = make_layer(device)["expert_TK"]
    torch.library.opcheck(OPS.plan_dispatch, (expert_TK, 3))


def random(device, *shapes):
    return tuple(torch.randn(shape, device=device) for shape in shapes)


def gating_backward_arguments(device):
    logits_TE, *grads = random(device, (12, 4), (12, 2), (3,), (3,), (3, 4))
    expert_TK = reference.topk_gating(logits_TE, 2).expert_TK
    return logits_TE, expert_TK, torch.rand(3, 4, device=device), *grads, 4, True


def combine_backward_arguments(device):
    y_NO, weight_TK, _, token_N, route_N, _ = combine_arguments(device)
    return *random(device, (6, 8)), y_NO, weight_TK, token_N, route_N


def grouped_gemm_backward_arguments(device, *need):
    offset_E1 = random_plan(6, 2, 3, device).offset_E1
    return *random(device, (12, 10), (12, 8), (3, 10, 8), (12, 10)), offset_E1, "gelu", *need


def moe_mlp_backward_arguments(device, saved_z, *need):
    x_TD, weight_TK, w1_EFD, w2_EOF, b1_EF, b2_EO, _, *plan, activation, gated, _ = moe_mlp_arguments(device)
    (dy_TO,) = random(device, (6, 17))
    (z_NF,) = random(device, (12, 36) if saved_z else (0,))
    return dy_TO, x_TD, weight_TK, w1_EFD, w2_EOF, b1_EF, b2_EO, z_NF, *plan, activation, gated, saved_z, list(need)


def reference_arguments(device):
    return *random(device, (12, 8), (3, 10, 8), (3, 10)), random_plan(6, 2, 3, device).offset_E1


# Operators without a formula for their gradient: backward ones, and those that hide the reference's loop.
OTHER_OPERATORS = [
    pytest.param(OPS.topk_gating_backward, gating_backward_arguments, id="topk_gating_backward"),
    pytest.param(
        OPS.permute_backward,
        lambda device: (*random(device, (12, 8)), random_plan(6, 2, 3, device).slot_TK),
        id="permute_backward",
    ),
    pytest.param(OPS.combine_backward, combine_backward_arguments, id="combine_backward"),
    *(
        pytest.param(
            OPS.grouped_gemm_backward,
            lambda device, need=need: grouped_gemm_backward_arguments(device, *need),
            id=f"grouped_gemm_backward-{name}",
        )
        for name, need in {"all": [True] * 3, "x": [True, False, False], "bias": [False, False, True]}.items()
    ),
    *(
        pytest.param(
            OPS.moe_mlp_backward,
            lambda device, saved_z=saved_z, need=need: moe_mlp_backward_arguments(device, saved_z, *need),
            id=f"moe_mlp_backward-{name}",
        )
        for name, saved_z, need in [
            ("all", True, [True] * 6),
            ("recomputed", False, [True] * 6),
            ("x", True, [True] + [False] * 5),
            ("b1", True, [False] * 4 + [True, False]),
        ]
    ),
    pytest.param(OPS.linear_rows_reference, reference_arguments, id="linear_rows_reference"),
    pytest.param(
        OPS.outer_rows_reference,
        lambda device: (*random(device, (12, 10), (12, 8)), random_plan(6, 2, 3, device).offset_E1),
        id="outer_rows_reference",
    ),
]


@pytest.mark.parametrize(("operator", "arguments"), OTHER_OPERATORS)
def test_operator_without_gradient_is_registered_as_pytorch_wants_it(operator, arguments, device):
    torch.library.opcheck(operator, arguments(device), test_utils=("test_schema", "test_faketensor"))


def layer_from_logits(logits_TE, x_TD, w1_EFD, w2_EOF, b1_EF, b2_EO, gated=False, recompute=False):
    """The whole layer and its losses, as a model calls it."""
    routing = ck.topk_gating(logits_TE, 2)
    y_TO = ck.moe_mlp(
        x_TD, routing.weight_TK, routing.expert_TK, w1_EFD, w2_EOF, b1_EF, b2_EO, "silu", gated, recompute
    )
    return y_TO, routing.balance_S, routing.z_S


def results_of(function, inputs, **options):
    """Outputs and gradients by position."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    outputs = function(*inputs, **options)
    torch.manual_seed(1)
    grads = torch.autograd.grad(outputs, inputs, [torch.randn_like(t) for t in outputs])
    return {str(i): t.detach() for i, t in enumerate((*outputs, *grads))}


def make_inputs(device, T, gated=False):
    layer = make_layer(device, T, gated=gated)
    del layer["weight_TK"], layer["expert_TK"]
    return [torch.randn(T, 3, device=device), *layer.values()]


@BACKENDS
@PLAIN_AND_GATED
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
def test_compiled_layer_equals_eager(recompute, gated, backend, device):
    inputs, options = make_inputs(device, 6, gated), {"gated": gated, "recompute": recompute}
    compiled = torch.compile(layer_from_logits, fullgraph=True, backend="aot_eager")
    with ck.use_backend(backend):
        expected = results_of(layer_from_logits, inputs, **options)
        actual = results_of(compiled, inputs, **options)
    assert_bitwise_equal(actual, expected)


@BACKENDS
def test_one_graph_serves_every_number_of_tokens(backend, device):
    compiled = torch.compile(layer_from_logits, fullgraph=True, backend="aot_eager", dynamic=True)
    with ck.use_backend(backend):
        results_of(compiled, make_inputs(device, 6))
        with torch.compiler.set_stance("fail_on_recompile"):
            for T in (7, 12, 2):
                inputs = make_inputs(device, T)
                assert_bitwise_equal(results_of(compiled, inputs), results_of(layer_from_logits, inputs))


@BACKENDS
def test_separate_operations_compile_whole(backend, device):
    def layer(x_TD, w_EFD, weight_TK, gate_ED):
        routing = ck.linear_topk_gating(x_TD, gate_ED, 2)
        plan = ck.plan_dispatch(routing.expert_TK, 3)
        h_NF = ck.grouped_gemm(ck.permute(x_TD, plan), w_EFD, plan, activation="gelu")
        return ck.combine(h_NF, weight_TK + routing.weight_TK, plan), routing.z_S

    shapes = (6, 8), (3, 10, 8), (6, 2), (3, 8)
    inputs = [torch.randn(shape, device=device) for shape in shapes]
    with ck.use_backend(backend):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert_bitwise_equal(results_of(compiled, inputs), results_of(layer, inputs))


def test_backend_forced_after_compilation_is_heeded(device):
    compiled = torch.compile(layer_from_logits, fullgraph=True, backend="aot_eager")
    inputs = make_inputs(device, 6)
    for backend in ("reference", "triton", "reference"):
        with ck.use_backend(backend), record_launches() as launches:
            compiled(*inputs)
        assert bool(launches) == (backend == "triton")


def tangent(x_TD, layer, **options):
    return torch.func.jvp(lambda x_TD: ck.moe_mlp(x_TD, *layer, **options), (x_TD,), (x_TD,))[1]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
def test_compiled_tangent_of_the_reference_equals_eager(recompute, device):
    x_TD, *layer = make_layer(device).values()
    layer[1] = torch.full_like(layer[1], -1).where(layer[1] == 2, layer[1])  # some choices are ignored
    compiled = torch.compile(tangent, fullgraph=True, backend="aot_eager")
    with ck.use_backend("reference"):
        expected = tangent(x_TD, layer, recompute=recompute)
        actual = compiled(x_TD, layer, recompute=recompute)
    assert relative_error(actual, expected) <= 4 * torch.finfo(torch.float32).eps


def test_compiled_kernels_refuse_forward_mode(device):
    x_TD, *layer = make_layer(device).values()
    compiled = torch.compile(lambda x_TD: ck.moe_mlp(x_TD, *layer), backend="aot_eager")
    with ck.use_backend("triton"), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x_TD, x_TD)
        with pytest.raises(RuntimeError, match="moe_mlp: forward-mode differentiation is not implemented"):
            compiled(dual)


def test_gradient_function_of_the_reference_compiles(device):
    x_TD, *layer = make_layer(device).values()
    grad = torch.func.grad(lambda x_TD: ck.moe_mlp(x_TD, *layer).square().sum())
    with ck.use_backend("reference"):
        actual = torch.compile(grad, fullgraph=True, backend="aot_eager")(x_TD)
        assert relative_error(actual, grad(x_TD)) <= 4 * torch.finfo(torch.float32).eps


@BACKENDS
def test_sizes_may_be_symbolic(backend, device):
    def route(logits_TE, top_k, segment):
        routing = ck.topk_gating(logits_TE, top_k, segment)
        return *routing, *ck.plan_dispatch(routing.expert_TK, logits_TE.shape[1])

    compiled = torch.compile(route, fullgraph=True, backend="aot_eager", dynamic=True)
    with ck.use_backend(backend):
        for T, top_k, segment in ((12, 2, 4), (15, 3, 5)):
            logits_TE = torch.randn(T, 4, device=device)
            pairs = zip(compiled(logits_TE, top_k, segment), route(logits_TE, top_k, segment), strict=True)
            assert all(torch.equal(*pair) for pair in pairs)


def test_compiled_inference_keeps_no_pre_activation(device):
    inputs = make_inputs(device, 6)
    saved = []

    def forward(*inputs):
        return layer_from_logits(*inputs)[0]

    def look(graph, _):
        saved.extend(node.args[-1] for node in graph.graph.nodes if node.target == OPS.moe_mlp.default)
        return graph.forward

    with ck.use_backend("triton"), torch.no_grad():
        torch.compile(forward, fullgraph=True, backend=look)(*inputs)
    assert saved == [False]
