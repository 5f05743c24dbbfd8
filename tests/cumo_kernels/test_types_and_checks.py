# SPDX-License-Identifier: Apache-2.0
"""`validate()` of both nouns finds each planted fault, and the checks of arguments say what they found."""

import numpy as np
import pytest
import torch

import cumo_kernels as ck
from cumo_kernels import checks, reference

EXPERT_TK = torch.tensor([[0, 2], [2, 0], [2, 3], [0, 2]], dtype=torch.int32)  # the id 3 is ignored


@pytest.fixture
def plan():
    return reference.plan_dispatch(EXPERT_TK, 3)


@pytest.fixture
def routing():
    return reference.topk_gating(torch.randn(6, 4), 2, segment=3)


def changed(tensor, at, value):
    tensor = tensor.clone()
    tensor[at] = value
    return tensor


def exchanged(tensor, i, j):
    return changed(changed(tensor, i, tensor[j]), j, tensor[i])


PLAN_FAULTS = [
    ("token_N", lambda t: t.long(), "token_N: expected int32, got torch.int64"),
    ("slot_TK", lambda t: t.float(), "slot_TK: expected int32"),
    ("token_N", lambda t: t[:-1], "route_N: expected shape"),
    ("slot_TK", lambda t: t[:, :1], "token_N: N=8, but slot_TK has T [*] K = 4"),
    ("offset_E1", lambda t: changed(t, 0, 1), "offset_E1: must rise from 0"),
    ("offset_E1", lambda t: changed(t, 2, 1), "offset_E1: must rise"),
    ("offset_E1", lambda t: changed(t, -1, 9), "offset_E1: .* at most N=8"),
    ("route_N", lambda t: changed(t, 0, 3), "route_N: not a permutation"),
    ("route_N", lambda t: changed(t, 0, -1), "route_N: not a permutation"),
    ("token_N", lambda t: changed(t, 0, 1), "token_N: must be route_N // K"),
    ("token_N", lambda t: changed(t, -1, 0), "token_N: .* -1 in the others"),
    ("slot_TK", lambda t: changed(t, (0, 0), 1), "slot_TK: not the inverse"),
    ("slot_TK", lambda t: changed(t, (2, 1), 7), "slot_TK: not the inverse"),
]


def test_right_plan_is_valid(plan):
    plan.validate()


@pytest.mark.parametrize(("field", "fault", "complaint"), PLAN_FAULTS)
def test_plan_finds_fault(field, fault, complaint, plan):
    with pytest.raises(ValueError, match=complaint):
        plan._replace(**{field: fault(getattr(plan, field))}).validate()


def test_plan_finds_rows_out_of_order(plan):
    """A sort that is not stable: everything fits together, but the order of an expert's rows is another."""
    route_N = exchanged(plan.route_N, 0, 1)
    slot_N = torch.empty(8, dtype=torch.int32)
    slot_N[route_N.long()] = torch.where(plan.token_N >= 0, torch.arange(8, dtype=torch.int32), -1)
    token_N = torch.where(plan.token_N >= 0, route_N // 2, -1)
    with pytest.raises(ValueError, match="route_N: rows of expert 0 are not in the order of the tokens"):
        plan._replace(route_N=route_N, slot_TK=slot_N.view(4, 2), token_N=token_N).validate()


def test_plan_finds_choices_with_the_wrong_expert_only_if_it_is_told_them(plan):
    """A plan does not know the ids it came from; that its rows are those of each expert, other tests see to."""
    other = reference.plan_dispatch(2 - EXPERT_TK, 3)
    other.validate()
    assert not torch.equal(other.offset_E1, plan.offset_E1)


ROUTING_FAULTS = [
    ("weight_TK", lambda t: t[1:], "expert_TK: expected shape"),
    ("weight_TK", lambda t: t[:, :1], "expert_TK: expected shape"),
    ("balance_S", lambda t: t[1:], "z_S: expected shape"),
    ("balance_S", lambda t: t[0], "balance_S: expected shape"),
    ("mean_probs_SE", lambda t: t[:, 1:], "mean_probs_SE: expected E=4"),
    ("expert_TK", lambda t: t.long(), "expert_TK: expected int32, got torch.int64"),
    ("expert_TK", lambda t: changed(t, (0, 0), 4), r"expert_TK: expected ids in 0..3, got \["),
    ("expert_TK", lambda t: changed(t, (5, 1), -1), r"expert_TK: expected ids in 0..3, got \[-1"),
    ("expert_TK", lambda t: changed(t, (3, 1), t[3, 0]), "expert_TK: a token names the same expert twice"),
]


def test_right_routing_is_valid(routing):
    routing.validate(4)


@pytest.mark.parametrize("T", [0, 1])
@pytest.mark.parametrize("K", [1, 4])
def test_routing_and_plan_of_few_tokens_are_valid(T, K):
    routing = reference.topk_gating(torch.randn(T, 4), K)
    routing.validate(4)
    reference.plan_dispatch(routing.expert_TK, 4).validate()


@pytest.mark.parametrize(("field", "fault", "complaint"), ROUTING_FAULTS)
def test_routing_finds_fault(field, fault, complaint, routing):
    with pytest.raises(ValueError, match=complaint):
        routing._replace(**{field: fault(getattr(routing, field))}).validate(4)


def test_nouns_are_frozen(plan, routing):
    for noun in (plan, routing):
        with pytest.raises(AttributeError):
            setattr(noun, noun._fields[0], None)


def test_plan_knows_the_number_of_experts(plan):
    assert plan.num_experts == 3


def test_shapes_are_bound_in_order_and_none_is_passed_over():
    x, y = torch.zeros(2, 3), torch.zeros(3)
    assert checks.check_shapes(x=(x, "T D"), b=(None, "Q"), y=(y, "D")) == {"T": 2, "D": 3}
    with pytest.raises(ValueError, match=r"y: expected shape \[T\] with T=2 as in x, got \[3\]"):
        checks.check_shapes(x=(x, "T D"), y=(y, "T"))


def test_segment_of_none_is_everything():
    assert checks.check_segment(None, 12) == 12
    assert checks.check_segment(4, 12) == 4
    assert checks.check_segment(577, 0) == 577


class Index:
    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint8, Index, int])
def test_counts_are_what_has_an_index(kind, backend, device):
    x_TD, gate_ED = torch.randn(12, 8, device=device), torch.randn(4, 8, device=device)
    with ck.use_backend(backend):
        for routing in (
            ck.topk_gating(x_TD[:, :4], kind(2), segment=kind(4)),
            ck.linear_topk_gating(x_TD, gate_ED, kind(2), segment=kind(4)),
        ):
            assert (routing.weight_TK.shape, routing.z_S.shape) == ((12, 2), (3,))
            assert ck.plan_dispatch(routing.expert_TK, kind(4)).num_experts == 4
    counts = checks.check_top_k(kind(2), 4), checks.check_segment(kind(4), 12), checks.check_num_experts(kind(4))
    assert [type(count) for count in counts] == [int] * 3


@pytest.mark.parametrize("value", [True, np.True_, 2.0, np.float64(2), "2", None, torch.tensor(2), -2, np.int64(0)])
def test_other_things_are_no_counts(value):
    with pytest.raises(ValueError, match=r"top_k: expected an integer in 1\.\.4"):
        checks.check_top_k(value, 4)
    with pytest.raises(ValueError, match="num_experts: expected a positive integer"):
        checks.check_num_experts(value)


def test_public_names_are_these():
    assert sorted(ck.__all__) == [
        "ACTIVATIONS", "DispatchPlan", "Routing", "combine", "grouped_gemm", "linear_topk_gating", "moe_mlp", "permute",
        "plan_dispatch", "topk_gating", "use_backend",
    ]  # fmt: skip
    assert all(hasattr(ck, name) for name in ck.__all__)
