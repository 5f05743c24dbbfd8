# SPDX-License-Identifier: Apache-2.0
"""The public surface, frozen: a change here is a change for everybody, and belongs in the CHANGELOG."""

import inspect

import pytest

import cumo
import cumo.nn
import cumo_kernels as ck

KERNELS = {
    "topk_gating": "logits_TE, top_k, segment=None, normalize=True, probs_dtype=torch.float32",
    "linear_topk_gating": "x_TD, gate_ED, top_k, segment=None, normalize=True, probs_dtype=torch.float32",
    "plan_dispatch": "expert_TK, num_experts",
    "permute": "x_TD, plan",
    "grouped_gemm": "x_ND, w_EFD, plan, bias_EF=None, activation=None",
    "combine": "y_NO, weight_TK, plan, residual_TO=None",
    "moe_mlp": "x_TD, weight_TK, expert_TK, w1_EFD, w2_EOF, b1_EF=None, b2_EO=None, activation='gelu', gated=False, "
    "recompute=False, residual_TO=None",
    "use_backend": "name",
}
NN = {
    "MoEMLP": "d_in, d_hidden, d_out=None, *, num_experts, top_k, activation='gelu', gated=False, bias=True, "
    "normalize=True, router_dtype=torch.float32, probs_dtype=torch.float32, recompute=False, device=None, dtype=None",
    "expert_load": "routing, num_experts",
    "upcycle": "model, pattern, num_experts, top_k, **options",
    "upcycle_mlp": "mlp, num_experts, top_k, *, activation=None, projections=None, noise=0.0, generator=None, "
    "normalize=True, router_dtype=torch.float32, probs_dtype=torch.float32, recompute=False",
}


def signature(function):
    """Names and defaults, without annotations."""
    parameters = inspect.signature(function).parameters.values()
    plain = inspect.Signature([parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters])
    return str(plain)[1:-1]


@pytest.mark.parametrize(("module", "expected"), [(ck, KERNELS), (cumo.nn, NN)], ids=["cumo_kernels", "cumo.nn"])
def test_signatures(module, expected):
    assert {name: signature(getattr(module, name)) for name in expected} == expected


def test_names():
    assert set(ck.__all__) == {*KERNELS, "ACTIVATIONS", "DispatchPlan", "Routing"}
    assert set(cumo.nn.__all__) == {*NN, "Upcycled"}
    assert set(cumo.__all__) == {
        "CuMoConfig", "CuMoForConditionalGeneration", "CuMoProcessor", "CuMoVisionConfig", "CuMoVisionModel",
        "__version__",
    }  # fmt: skip


def test_fields_of_what_travels_between_the_operations():
    assert ck.Routing._fields == ("weight_TK", "expert_TK", "balance_S", "z_S", "mean_probs_SE")
    assert ck.DispatchPlan._fields == ("token_N", "route_N", "slot_TK", "offset_E1")
    assert tuple(ck.ACTIVATIONS) == ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "relu2")


def test_commands():
    from cumo.cli import COMMANDS

    assert set(COMMANDS) == {"chat", "convert", "demo", "eval", "export-vllm", "serve", "train", "upcycle"}
