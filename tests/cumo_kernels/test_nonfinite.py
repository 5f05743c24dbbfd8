# SPDX-License-Identifier: Apache-2.0
"""NaN and infinity stay with the token that brought them."""

import math

import pytest
import torch

import cumo_kernels as ck
from tests.cumo_kernels.harness import PLAIN_AND_GATED, make_layer
from tests.numerics import assert_bitwise_equal

# NumPy, which carries out the kernels in the interpreter, warns of what these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")

T, E, K, VICTIM = 20, 3, 2, 7
OTHERS = [t for t in range(T) if t != VICTIM]

BAD_LOGITS = [
    pytest.param([math.nan, 0.0, 0.0], id="nan"),
    pytest.param([0.0, 0.0, math.nan], id="nan-last"),
    pytest.param([math.nan] * 3, id="all-nan"),
    pytest.param([0.0, math.inf, 0.0], id="inf"),
    pytest.param([math.inf, math.inf, math.nan], id="inf-and-nan"),
    pytest.param([-math.inf] * 3, id="all-minus-inf"),
]


@pytest.fixture(autouse=True, params=["triton", "reference"])
def _backend(request):
    with ck.use_backend(request.param):
        yield


@pytest.fixture
def layer(device):
    """A layer that lacks its routing."""
    tensors = make_layer(device, T, K, E)
    return {name: tensor for name, tensor in tensors.items() if name not in ("weight_TK", "expert_TK")}


def of_others(tensor):
    return {"others": tensor[OTHERS]}


@pytest.mark.parametrize("bad", BAD_LOGITS)
def test_token_with_bad_logits_gets_nan_and_distinct_experts(bad, layer, device):
    logits_TE = torch.randn(T, E, device=device)
    clean = ck.topk_gating(logits_TE, K)
    clean_y_TO = ck.moe_mlp(weight_TK=clean.weight_TK, expert_TK=clean.expert_TK, **layer)
    logits_TE[VICTIM] = torch.tensor(bad)
    routing = ck.topk_gating(logits_TE, K)
    routing.validate(E)
    y_TO = ck.moe_mlp(weight_TK=routing.weight_TK, expert_TK=routing.expert_TK, **layer)
    assert routing.weight_TK[VICTIM].isnan().all()
    assert y_TO[VICTIM].isnan().all()
    assert_bitwise_equal(of_others(routing.weight_TK), of_others(clean.weight_TK))
    assert_bitwise_equal(of_others(routing.expert_TK), of_others(clean.expert_TK))
    assert_bitwise_equal(of_others(y_TO), of_others(clean_y_TO))


def test_losses_of_other_segments_stay_finite(device):
    logits_TE = torch.randn(T, E, device=device)
    logits_TE[VICTIM, 0] = math.nan
    routing = ck.topk_gating(logits_TE, K, segment=5)
    bad_S = torch.arange(T // 5, device=device) == VICTIM // 5
    for losses in (routing.balance_S, routing.z_S, routing.mean_probs_SE.sum(dim=1)):
        assert torch.equal(losses.isnan(), bad_S)


def test_an_expert_at_minus_infinity_is_chosen_last_and_gets_no_weight(device):
    logits_TE = torch.randn(T, E, device=device)
    logits_TE[:, 1] = -math.inf
    routing = ck.topk_gating(logits_TE, E)
    routing.validate(E)
    assert (routing.expert_TK[:, -1] == 1).all()
    assert (routing.weight_TK[:, -1] == 0).all()
    assert routing.weight_TK.isfinite().all()
    assert routing.balance_S.isfinite().all()
    assert routing.z_S.isfinite().all()


def test_gradient_of_bad_logits_stays_with_their_token(device):
    logits_TE = torch.randn(T, E, device=device)
    dweight_TK = torch.randn(T, K, device=device)

    def gradient():
        leaf = logits_TE.clone().requires_grad_()
        return torch.autograd.grad(ck.topk_gating(leaf, K).weight_TK, leaf, dweight_TK)[0]

    clean = gradient()
    logits_TE[VICTIM, 1] = math.nan
    bad = gradient()
    assert bad[VICTIM].isnan().all()
    assert_bitwise_equal(of_others(bad), of_others(clean))


@PLAIN_AND_GATED
@pytest.mark.parametrize("activation", ck.ACTIVATIONS)
def test_nan_in_a_token_stays_in_its_output_and_gradients(activation, gated, device):
    """Of the gradients of tokens and gate weights; those of the parameters are sums over tokens."""
    layer = make_layer(device, T, K, E, gated=gated)
    dy_TO = torch.randn(T, 17, device=device)

    def results():
        x_TD, weight_TK = (layer[name].clone().requires_grad_() for name in ("x_TD", "weight_TK"))
        y_TO = ck.moe_mlp(**{**layer, "x_TD": x_TD, "weight_TK": weight_TK}, activation=activation, gated=gated)
        return [y_TO.detach(), *torch.autograd.grad(y_TO, (x_TD, weight_TK), dy_TO)]

    clean = results()
    layer["x_TD"][VICTIM, 3] = math.nan
    bad = results()
    for actual, expected in zip(bad, clean, strict=True):
        assert_bitwise_equal(of_others(actual), of_others(expected))
    y_TO, _, dweight_TK = bad
    assert y_TO[VICTIM].isnan().all()
    assert dweight_TK[VICTIM].isnan().all()


def test_nan_in_a_weight_stays_with_its_expert(device):
    layer = make_layer(device, T, 1, E)
    clean = ck.moe_mlp(**layer)
    layer["w1_EFD"][1, 5, 5] = math.nan
    bad = ck.moe_mlp(**layer)
    of_expert = layer["expert_TK"][:, 0] == 1
    assert bad[of_expert].isnan().all()
    assert_bitwise_equal({"others": bad[~of_expert]}, {"others": clean[~of_expert]})
