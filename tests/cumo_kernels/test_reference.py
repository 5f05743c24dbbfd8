# SPDX-License-Identifier: Apache-2.0
"""The reference, by which the kernels are judged: against loops over tokens in float64, and its gradients against
finite differences."""

import pytest
import torch

import cumo_kernels as ck
from tests import oracles
from tests.cumo_kernels.harness import PLAIN_AND_GATED, in_float64, make_layer, random_plan
from tests.numerics import assert_bitwise_equal, relative_error

CPU = torch.device("cpu")
# PyTorch scripts its decompositions when a forward-mode level is first entered.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
FLOAT64_UNITS = 1e-13  # some hundred units of float64: sums in another order


@pytest.fixture(autouse=True)
def _reference_backend():
    with ck.use_backend("reference"):
        yield


def make_layer64(**options):
    """A layer in float64, small enough for finite differences."""
    sizes = {"T": 5, "D": 3, "F": 4, "O": 2}
    return in_float64(make_layer(CPU, **(sizes | options)))


@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "not-normalized"])
@pytest.mark.parametrize(
    ("T", "E", "K", "segment"),
    [
        pytest.param(0, 4, 2, None, id="no-tokens"),
        pytest.param(1, 4, 2, None, id="one-token"),
        pytest.param(12, 4, 2, 4, id="three-segments"),
        pytest.param(12, 3, 3, 1, id="every-expert-and-segments-of-one-token"),
        pytest.param(5, 1, 1, None, id="one-expert"),
        pytest.param(40, 60, 4, 20, id="sixty-experts"),
    ],
)
def test_gating_equals_the_oracle(T, E, K, segment, normalize):
    logits_TE = torch.randn(T, E, dtype=torch.float64)
    routing = ck.topk_gating(logits_TE, K, segment, normalize)
    routing.validate(E)
    expected = oracles.gating(logits_TE, K, segment, normalize)
    assert torch.equal(routing.expert_TK, expected.pop("expert_TK"))
    for name, tensor in expected.items():
        assert relative_error(getattr(routing, name), tensor) <= FLOAT64_UNITS, name


def test_gating_breaks_ties_to_the_lowest_index():
    logits_TE = torch.randint(0, 2, (50, 6)).double()
    assert torch.equal(ck.topk_gating(logits_TE, 3).expert_TK, oracles.gating(logits_TE, 3)["expert_TK"])


def test_linear_gating_is_gating_of_the_logits():
    x_TD, gate_ED = torch.randn(12, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    actual = ck.linear_topk_gating(x_TD, gate_ED, 2, segment=4)
    expected = oracles.gating((x_TD.unsqueeze(1) * gate_ED).sum(dim=2), 2, segment=4)
    assert torch.equal(actual.expert_TK, expected.pop("expert_TK"))
    for name, tensor in expected.items():
        assert relative_error(getattr(actual, name), tensor) <= FLOAT64_UNITS, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gating_equals_the_published_router(dtype):
    """In the dtype of the activations: the same experts and weights bit for bit, and the losses' mean over images."""
    B, N, E, K = 3, 50, 4, 2
    logits_BNE = torch.randn(B, N, E).to(dtype)
    weights, experts, balance, z = oracles.published_router(logits_BNE, K)
    routing = ck.topk_gating(logits_BNE.flatten(0, 1), K, segment=N, probs_dtype=dtype)
    probs = logits_BNE.float().softmax(dim=-1).to(dtype).sort(dim=-1, descending=True).values
    # `torch.topk` leaves the order of ties open, and rounding to bfloat16 makes some
    clear = (probs.diff(dim=-1)[..., :K] != 0).all(dim=-1).flatten()
    assert clear.sum() > 0.9 * clear.numel()
    assert torch.equal(routing.expert_TK[clear], experts.flatten(0, 1)[clear].int())
    assert torch.equal(routing.weight_TK[clear], weights.flatten(0, 1)[clear])
    eps = torch.finfo(dtype).eps
    assert relative_error(routing.balance_S.mean(), balance) <= 4 * eps
    assert relative_error(routing.z_S.mean(), z) <= 4 * eps


def with_ids(expert_TK, dtype=torch.int32):
    """Every id that names no expert of three, beside those that do."""
    expert_TK = expert_TK.to(dtype)
    expert_TK[0, 0], expert_TK[1, 1], expert_TK[2, 0] = 3, 6, -1
    return expert_TK


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("T", [0, 1, 20], ids=["no-tokens", "one-token", "twenty-tokens"])
def test_plan_equals_the_oracle(T, dtype):
    expert_TK = make_layer(CPU, T=T)["expert_TK"].to(dtype)
    if T > 2:
        expert_TK = with_ids(expert_TK, dtype)
    plan = ck.plan_dispatch(expert_TK, 3)
    plan.validate()
    assert_bitwise_equal(plan._asdict(), oracles.plan(expert_TK, 3))


@PLAIN_AND_GATED
@pytest.mark.parametrize("activation", ck.ACTIVATIONS)
def test_layer_with_every_activation_equals_the_oracle(activation, gated):
    layer = make_layer64(gated=gated)
    options = {"activation": activation, "gated": gated}
    assert relative_error(ck.moe_mlp(**layer, **options), oracles.expert_mlp(**layer, **options)) <= FLOAT64_UNITS


@pytest.mark.parametrize("T", [0, 1, 5], ids=["no-tokens", "one-token", "ignored-ids"])
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize("residual", [False, True], ids=["no-residual", "residual"])
@pytest.mark.parametrize("missing", [(), ("b1_EF",), ("b2_EO",), ("b1_EF", "b2_EO")], ids=["none", "b1", "b2", "both"])
def test_layer_with_every_option_equals_the_oracle(missing, residual, recompute, T):
    layer = make_layer64(T=T)
    if T > 2:
        layer["expert_TK"] = with_ids(layer["expert_TK"])
    layer |= dict.fromkeys(missing)
    layer["residual_TO"] = torch.randn(T, 2, dtype=torch.float64) if residual else None
    expected = oracles.expert_mlp(**layer)
    assert relative_error(ck.moe_mlp(**layer, recompute=recompute), expected) <= FLOAT64_UNITS


@PLAIN_AND_GATED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_layer_in_every_dtype_stays_within_its_roundings(dtype, gated):
    layer = make_layer(CPU, T=20, gated=gated, dtype=dtype)
    actual = ck.moe_mlp(**layer, gated=gated)
    assert actual.dtype == dtype
    # at most four tensors are rounded on the way: both halves of z, a, y, and the output
    assert relative_error(actual, oracles.expert_mlp(**layer, gated=gated)) <= 4 * torch.finfo(dtype).eps


def test_layer_is_the_composition_of_the_operations():
    layer = make_layer64()
    plan = ck.plan_dispatch(layer["expert_TK"], 3)
    h_NF = ck.grouped_gemm(ck.permute(layer["x_TD"], plan), layer["w1_EFD"], plan, layer["b1_EF"], "silu")
    y_NO = ck.grouped_gemm(h_NF, layer["w2_EOF"], plan, layer["b2_EO"])
    y_TO = ck.combine(y_NO, layer["weight_TK"], plan)
    assert relative_error(ck.moe_mlp(**layer, activation="silu"), y_TO) <= FLOAT64_UNITS


def check_gradients(function, *inputs, second=False):
    """In reverse and in forward mode, against finite differences; integers and None are constants."""
    leaves = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in inputs]
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    if second:
        assert torch.autograd.gradgradcheck(function, leaves, check_fwd_over_rev=True)


@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "not-normalized"])
def test_gradients_of_the_gating(normalize):
    def floats(logits_TE):
        routing = ck.topk_gating(logits_TE, 2, segment=3, normalize=normalize)
        return routing.weight_TK, routing.balance_S, routing.z_S, routing.mean_probs_SE

    check_gradients(floats, torch.randn(6, 3, dtype=torch.float64), second=True)


def test_gradients_of_the_linear_gating():
    def floats(x_TD, gate_ED):
        routing = ck.linear_topk_gating(x_TD, gate_ED, 2, segment=2)
        return routing.weight_TK, routing.balance_S, routing.z_S, routing.mean_probs_SE

    check_gradients(floats, torch.randn(6, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64))


IGNORED = pytest.mark.parametrize("ignored", [0, 2], ids=["all-used", "ignored-choices"])


@IGNORED
def test_gradients_of_permute(ignored):
    plan = random_plan(5, 2, 3, CPU, ignored)
    check_gradients(lambda x_TD: ck.permute(x_TD, plan), torch.randn(5, 3, dtype=torch.float64), second=True)


@IGNORED
@pytest.mark.parametrize("activation", [None, "gelu"], ids=["linear", "gelu"])
def test_gradients_of_the_grouped_gemm(activation, ignored):
    plan = random_plan(5, 2, 3, CPU, ignored)
    shapes = (10, 3), (3, 4, 3), (3, 4)
    check_gradients(
        lambda x, w, b: ck.grouped_gemm(x, w, plan, b, activation),
        *(torch.randn(shape, dtype=torch.float64) for shape in shapes),
        second=True,
    )


@IGNORED
def test_gradients_of_combine(ignored):
    plan = random_plan(5, 2, 3, CPU, ignored)
    shapes = (10, 3), (5, 2), (5, 3)
    check_gradients(
        lambda y, weight, residual: ck.combine(y, weight, plan, residual),
        *(torch.randn(shape, dtype=torch.float64) for shape in shapes),
        second=True,
    )


@IGNORED
@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
@PLAIN_AND_GATED
def test_gradients_of_the_layer(gated, recompute, ignored):
    layer = make_layer64(gated=gated)
    if ignored:
        layer["expert_TK"] = with_ids(layer["expert_TK"])
    residual_TO = torch.randn(5, 2, dtype=torch.float64)

    def function(*inputs):
        return ck.moe_mlp(*inputs, activation="silu", gated=gated, recompute=recompute, residual_TO=residual_TO)

    check_gradients(function, *layer.values(), second=True)


def test_gradient_of_the_residual():
    layer = make_layer64()
    check_gradients(lambda r: ck.moe_mlp(**layer, residual_TO=r), torch.randn(5, 2, dtype=torch.float64))
