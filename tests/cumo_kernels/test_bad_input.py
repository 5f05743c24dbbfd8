# SPDX-License-Identifier: Apache-2.0
"""Arguments that do not fit: a ValueError names the argument, what came and what was expected, and nothing is run."""

import re

import pytest
import torch

import cumo_kernels as ck
from cumo_kernels.kernels.launch import record_launches
from tests.cumo_kernels.harness import make_layer, random_plan

META = torch.device("meta")


def gating(device, logits_TE=None, top_k=2, **options):
    ck.topk_gating(torch.randn(12, 4, device=device) if logits_TE is None else logits_TE, top_k, **options)


def linear_gating(device, x=(12, 8), gate=(4, 8), x_dtype=torch.float32, gate_dtype=torch.float32, gate_device=None):
    x_TD = torch.zeros(x, dtype=x_dtype, device=device)
    ck.linear_topk_gating(x_TD, torch.zeros(gate, dtype=gate_dtype, device=gate_device or device), 2)


def plan(device, expert_TK=None, num_experts=3):
    zeros_TK = torch.zeros(6, 2, dtype=torch.int32, device=device)
    ck.plan_dispatch(zeros_TK if expert_TK is None else expert_TK, num_experts)


def changed_plan(device, changes):
    """A plan of 6 tokens, 2 choices and 3 experts, with some of its fields changed."""
    plan = random_plan(6, 2, 3, device)
    return plan._replace(**{name: change(getattr(plan, name)) for name, change in (changes or {}).items()})


def permute(device, x=(6, 8), dtype=torch.float32, x_device=None, plan=None):
    ck.permute(torch.zeros(x, dtype=dtype, device=x_device or device), changed_plan(device, plan))


def grouped_gemm(device, activation=None, plan=None, **changes):
    tensors = {"x_ND": torch.zeros(12, 8), "w_EFD": torch.zeros(3, 5, 8), "bias_EF": torch.zeros(3, 5)} | changes
    tensors = {name: t if t.is_meta else t.to(device) for name, t in tensors.items()}
    ck.grouped_gemm(**tensors, plan=changed_plan(device, plan), activation=activation)


def combine(device, plan=None, **changes):
    tensors = {"y_NO": torch.zeros(12, 8), "weight_TK": torch.zeros(6, 2), "residual_TO": torch.zeros(6, 8)} | changes
    tensors = {name: t if t.is_meta else t.to(device) for name, t in tensors.items()}
    ck.combine(**tensors, plan=changed_plan(device, plan))


def moe_mlp(device, gated=False, activation="gelu", **changes):
    layer = make_layer(device) | {"residual_TO": torch.zeros(6, 17, device=device)}
    layer |= {name: change(layer[name]) for name, change in changes.items()}
    ck.moe_mlp(**layer, gated=gated, activation=activation)


def case(call, message, id, **arguments):
    """`message` starts with the name of the argument."""
    return pytest.param(call, arguments, message, id=f"{call.__name__}-{id}")


# The kernels would take each of these for something else, most of them silently.
PLAN_FAULTS = [
    ("token_N: expected int32, got torch.int64", "plan-of-int64-tokens", torch.Tensor.long),
    ("route_N: expected int32, got torch.int64", "plan-of-int64-routes", torch.Tensor.long),
    ("slot_TK: expected int32, got torch.int64", "plan-of-int64-slots", torch.Tensor.long),
    ("offset_E1: expected int32, got torch.float32", "plan-of-float-offsets", torch.Tensor.float),
    ("route_N: expected shape [N] with N=", "plan-with-a-route-short", lambda t: t[1:]),
    ("slot_TK: expected shape [T K], got [12]", "plan-with-flat-slots", torch.Tensor.flatten),
    ("slot_TK: expected shape [T K] with ", "plan-with-a-choice-more", lambda t: t.repeat(1, 2)),
    ("offset_E1: expected shape [E + 1] with E >= 1, got [1]", "plan-of-no-experts", lambda t: t[:1]),
    ("route_N: expected int32, got None", "plan-without-routes", lambda _: None),
    ("slot_TK: expected device", "plan-with-slots-elsewhere", lambda t: t.to(META)),
    ("offset_E1: expected device", "plan-with-offsets-elsewhere", lambda t: t.to(META)),
]

ON_EITHER_BACKEND = [
    case(gating, "logits_TE: expected shape [T E], got [4]", "one-dimension", logits_TE=torch.zeros(4)),
    case(gating, "logits_TE: expected a tensor of shape [T E], got list", "no-tensor", logits_TE=[[0.0]]),
    case(gating, "logits_TE: expected a floating-point dtype, got torch.int64", "integers",
         logits_TE=torch.zeros(12, 4, dtype=torch.int64)),
    case(gating, "top_k: expected an integer in 1..4 (the number of experts), got 0", "no-choice", top_k=0),
    case(gating, "top_k: expected an integer in 1..4 (the number of experts), got 5", "too-many-choices", top_k=5),
    case(gating, "top_k: expected an integer in 1..4 (the number of experts), got 2.0", "float-top-k", top_k=2.0),
    case(gating, "top_k: expected an integer in 1..4 (the number of experts), got True", "bool-top-k", top_k=True),
    case(gating, "top_k: expected an integer in 1..0", "no-experts", logits_TE=torch.zeros(12, 0)),
    case(gating, "segment: expected a divisor of the 12 tokens, got 5", "segment-that-divides-not", segment=5),
    case(gating, "segment: expected a divisor of the 12 tokens, got 0", "segment-of-nothing", segment=0),
    case(gating, "segment: expected a divisor of the 12 tokens, got -4", "negative-segment", segment=-4),
    case(gating, "segment: expected a divisor of the 12 tokens, got 4.0", "float-segment", segment=4.0),
    case(gating, "probs_dtype: expected one of [torch.float32, torch.bfloat16, torch.float16], got torch.float64",
         "float64-probabilities", probs_dtype=torch.float64),
    case(linear_gating, "gate_ED: expected shape [E D] with D=8 as in x_TD, got [4, 9]", "widths-differ", gate=(4, 9)),
    case(linear_gating, "x_TD: expected a floating-point dtype, got torch.int32", "integers", x_dtype=torch.int32),
    case(linear_gating, "gate_ED: expected a floating-point dtype, got torch.int8", "integer-router",
         gate_dtype=torch.int8),
    case(linear_gating, "gate_ED: expected device", "router-elsewhere", gate_device=META),
    case(linear_gating, "top_k: expected an integer in 1..1", "fewer-experts-than-choices", gate=(1, 8)),
    case(plan, "expert_TK: expected int32 or int64, got torch.float32", "float-ids", expert_TK=torch.zeros(6, 2)),
    case(plan, "expert_TK: expected shape [T K], got [6]", "one-dimension",
         expert_TK=torch.zeros(6, dtype=torch.int32)),
    case(plan, "expert_TK: expected at least one expert per token", "no-choices",
         expert_TK=torch.zeros(6, 0, dtype=torch.int32)),
    case(plan, "num_experts: expected a positive integer, got 0", "no-experts", num_experts=0),
    case(plan, "num_experts: expected a positive integer, got True", "bool-experts", num_experts=True),
    case(plan, "num_experts: expected a positive integer, got 2.5", "float-experts", num_experts=2.5),
    case(permute, "plan.slot_TK: expected shape [T K] with T=7 as in x_TD, got [6, 2]", "plan-of-other-tokens",
         x=(7, 8)),
    case(permute, "x_TD: expected a floating-point dtype, got torch.int32", "integers", dtype=torch.int32),
    case(permute, "plan.token_N: expected device meta as x_TD, got", "plan-elsewhere", x_device=META),
    *(
        case(call, f"plan.{message}", id, plan={message.partition(":")[0]: fault})
        for call in (permute, grouped_gemm, combine)
        for message, id, fault in PLAN_FAULTS
    ),
    case(grouped_gemm, "plan.token_N: expected shape [N] with N=13 as in x_ND, got [12]", "plan-of-other-rows",
         x_ND=torch.zeros(13, 8)),
    case(grouped_gemm, "w_EFD: expected shape [E F D] with D=8 as in x_ND, got [3, 5, 9]", "widths-differ",
         w_EFD=torch.zeros(3, 5, 9)),
    case(grouped_gemm, "w_EFD: expected E=3 experts as in plan, got [4, 5, 8]", "more-experts-than-in-the-plan",
         w_EFD=torch.zeros(4, 5, 8), bias_EF=torch.zeros(4, 5)),
    case(grouped_gemm, "bias_EF: expected shape [E F] with F=5 as in w_EFD, got [3, 8]", "bias-of-the-input-width",
         bias_EF=torch.zeros(3, 8)),
    case(grouped_gemm, "w_EFD: expected dtype torch.float32 as x_ND, got torch.bfloat16", "dtypes-differ",
         w_EFD=torch.zeros(3, 5, 8, dtype=torch.bfloat16)),
    case(grouped_gemm, "w_EFD: expected device", "weights-elsewhere", w_EFD=torch.zeros(3, 5, 8, device=META)),
    case(grouped_gemm, "activation: expected one of ['gelu', ", "unknown-activation", activation="swish"),
    case(combine, "plan.token_N: expected shape [N] with N=11 as in y_NO, got [12]", "plan-of-other-rows",
         y_NO=torch.zeros(11, 8)),
    case(combine, "plan.slot_TK: expected shape [T K] with K=3 as in weight_TK, got [6, 2]",
         "more-weights-than-choices", weight_TK=torch.zeros(6, 3)),
    case(combine, "residual_TO: expected shape [T O] with O=8 as in y_NO, got [6, 9]", "residual-of-another-width",
         residual_TO=torch.zeros(6, 9)),
    case(combine, "residual_TO: expected dtype torch.float32 as y_NO, got torch.float16", "residual-of-another-dtype",
         residual_TO=torch.zeros(6, 8, dtype=torch.float16)),
    case(combine, "weight_TK: expected a floating-point dtype, got torch.int64", "integer-weights",
         weight_TK=torch.zeros(6, 2, dtype=torch.int64)),
    case(combine, "residual_TO: expected device", "residual-elsewhere", residual_TO=torch.zeros(6, 8, device=META)),
    case(moe_mlp, "weight_TK: expected shape [T K] with T=6 as in x_TD, got [5, 2]", "a-weight-short",
         weight_TK=lambda t: t[1:]),
    case(moe_mlp, "expert_TK: expected shape [T K] with K=2 as in weight_TK, got [6, 1]", "a-choice-short",
         expert_TK=lambda t: t[:, 1:]),
    case(moe_mlp, "expert_TK: expected K >= 1, got [6, 0]", "no-choices", weight_TK=lambda t: t[:, :0],
         expert_TK=lambda t: t[:, :0]),
    case(moe_mlp, "w1_EFD: expected E >= 1, got [0, 36, 20]", "no-experts",
         **dict.fromkeys(["w1_EFD", "w2_EOF", "b1_EF", "b2_EO"], lambda t: t[:0])),
    case(moe_mlp, "w1_EFD: expected shape [E F1 D] with D=20 as in x_TD, got [3, 20, 36]", "w1-transposed",
         w1_EFD=lambda t: t.transpose(1, 2)),
    case(moe_mlp, "w2_EOF: expected shape [E O F] with E=3 as in w1_EFD, got [2, 17, 36]", "experts-differ",
         w2_EOF=lambda t: t[1:]),
    case(moe_mlp, "b1_EF: expected shape [E F1] with F1=36 as in w1_EFD, got [3, 35]", "b1-short",
         b1_EF=lambda t: t[:, 1:]),
    case(moe_mlp, "b2_EO: expected shape [E O] with O=17 as in w2_EOF, got [3, 16]", "b2-short",
         b2_EO=lambda t: t[:, 1:]),
    case(moe_mlp, "residual_TO: expected shape [T O] with O=17 as in w2_EOF, got [6, 16]", "residual-narrow",
         residual_TO=lambda t: t[:, 1:]),
    case(moe_mlp, "w1_EFD: expected 72 rows per expert (2 * F, with F=36 as in w2_EOF and gated=True), got [3, 36, 20]",
         "gated-without-gate-rows", gated=True),
    case(moe_mlp, "w1_EFD: expected 18 rows per expert (F, with F=18 as in w2_EOF and gated=False), got [3, 36, 20]",
         "gate-rows-without-gated", w2_EOF=lambda t: t[:, :, :18]),
    case(moe_mlp, "w2_EOF: expected dtype torch.float32 as x_TD, got torch.bfloat16", "dtypes-differ",
         w2_EOF=torch.Tensor.bfloat16),
    case(moe_mlp, "residual_TO: expected dtype torch.float32 as x_TD, got torch.float16", "residual-of-another-dtype",
         residual_TO=torch.Tensor.half),
    case(moe_mlp, "weight_TK: expected a floating-point dtype, got torch.int64", "integer-weights",
         weight_TK=torch.Tensor.long),
    case(moe_mlp, "expert_TK: expected int32 or int64, got torch.float32", "float-ids", expert_TK=torch.Tensor.float),
    case(moe_mlp, "x_TD: expected a floating-point dtype, got torch.int64", "integer-tokens", x_TD=torch.Tensor.long),
    *(
        case(moe_mlp, f"{name}: expected device", f"{name}-elsewhere", **{name: lambda t: t.to(META)})
        for name in ("weight_TK", "expert_TK", "w1_EFD", "w2_EOF", "b1_EF", "b2_EO", "residual_TO")
    ),
    case(moe_mlp, f"activation: expected one of {list(ck.ACTIVATIONS)}, got 'tanh'", "unknown-activation",
         activation="tanh"),
    case(moe_mlp, "activation: expected one of ", "no-activation", activation=None),
]  # fmt: skip

FLOAT64 = {"dtype": torch.float64}
ON_THE_TRITON_BACKEND = [
    case(gating, "logits_TE: the triton backend expects at most 1024 experts, got 1025", "too-many-experts",
         logits_TE=torch.zeros(12, 1025)),
    case(gating, "logits_TE: the triton backend expects float16, bfloat16 or float32, got torch.float64", "float64",
         logits_TE=torch.zeros(12, 4, **FLOAT64)),
    case(linear_gating, "gate_ED: the triton backend expects at most 64 experts, got 65", "too-many-experts",
         gate=(65, 8)),
    case(linear_gating, "x_TD: the triton backend expects float16, bfloat16 or float32, got torch.float64",
         "float64-tokens", x_dtype=torch.float64),
    case(linear_gating, "gate_ED: the triton backend expects float16, bfloat16 or float32, got torch.float64",
         "float64-router", gate_dtype=torch.float64),
    case(permute, "x_TD: the triton backend expects", "float64", **FLOAT64),
    case(grouped_gemm, "x_ND: the triton backend expects", "float64", x_ND=torch.zeros(12, 8, **FLOAT64),
         w_EFD=torch.zeros(3, 5, 8, **FLOAT64), bias_EF=torch.zeros(3, 5, **FLOAT64)),
    case(combine, "weight_TK: the triton backend expects", "float64-weights", weight_TK=torch.zeros(6, 2, **FLOAT64)),
    case(moe_mlp, "weight_TK: the triton backend expects", "float64-weights", weight_TK=torch.Tensor.double),
    case(moe_mlp, "x_TD: the triton backend expects", "float64",
         **dict.fromkeys(["x_TD", "w1_EFD", "w2_EOF", "b1_EF", "b2_EO", "residual_TO"], torch.Tensor.double)),
]  # fmt: skip


def assert_refused(backend, call, arguments, message, device):
    arguments = {n: t.to(device) if isinstance(t, torch.Tensor) and not t.is_meta else t for n, t in arguments.items()}
    refused = pytest.raises(ValueError, match="^" + re.escape(message))
    with ck.use_backend(backend), record_launches() as launches, refused:
        call(device, **arguments)
    assert not launches


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(("call", "arguments", "message"), ON_EITHER_BACKEND)
def test_bad_argument_is_named(call, arguments, message, backend, device):
    assert_refused(backend, call, arguments, message, device)


@pytest.mark.parametrize(("call", "arguments", "message"), ON_THE_TRITON_BACKEND)
def test_what_the_kernels_do_not_take_is_named(call, arguments, message, device):
    assert_refused("triton", call, arguments, message, device)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_plan_is_a_dispatch_plan(backend, device):
    message = r"^plan: expected a DispatchPlan, got tuple"
    with ck.use_backend(backend), pytest.raises(ValueError, match=message):
        ck.permute(torch.zeros(6, 8, device=device), tuple(random_plan(6, 2, 3, device)))


AUTOCAST_FAULTS = [
    case(moe_mlp, "residual_TO: expected dtype torch.bfloat16 of autocast, got torch.float32", "residual"),
    case(moe_mlp, "w2_EOF: expected dtype torch.float32 as x_TD, got torch.float64", "float64",
         w2_EOF=torch.Tensor.double),
    case(moe_mlp, "x_TD: expected a floating-point dtype, got torch.int64", "integers", x_TD=torch.Tensor.long),
    case(grouped_gemm, "bias_EF: expected dtype torch.float32 as x_ND, got torch.float64", "float64",
         bias_EF=torch.zeros(3, 5, dtype=torch.float64)),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(("call", "arguments", "message"), AUTOCAST_FAULTS)
def test_dtypes_under_autocast_are_those_of_the_caller(call, arguments, message, backend, device):
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert_refused(backend, call, arguments, message, device)


def test_good_arguments_are_not_refused(device):
    with ck.use_backend("reference"):
        for call in (gating, linear_gating, plan, permute, grouped_gemm, combine, moe_mlp):
            call(device)
