# SPDX-License-Identifier: Apache-2.0
"""The comparison by which the kernels are judged finds faults: layers that are wrong on purpose must not pass."""

import pytest
import torch

from cumo_kernels import reference
from tests.cumo_kernels.harness import FP32_AND_BF16, assert_agrees, make_layer, random_plan


def swapped_halves(w1_EFD, b1_EF, **kw):
    swapped = (torch.cat(t.chunk(2, dim=1)[::-1], dim=1) for t in (w1_EFD, b1_EF))
    return reference.moe_mlp(**kw, **dict(zip(("w1_EFD", "b1_EF"), swapped, strict=True)))


def gate_dropped(weight_TK, **kw):
    return reference.moe_mlp(weight_TK=torch.ones_like(weight_TK) + 0 * weight_TK, **kw)


def second_bias_not_gated(weight_TK, expert_TK, b2_EO, **kw):
    y_TO = reference.moe_mlp(weight_TK=weight_TK, expert_TK=expert_TK, b2_EO=None, **kw)
    return y_TO + b2_EO[expert_TK.long()].sum(dim=1) + 0 * weight_TK.sum().to(y_TO.dtype)


def first_choice_twice(expert_TK, **kw):
    return reference.moe_mlp(expert_TK=expert_TK[:, :1].expand_as(expert_TK), **kw)


def one_token_wrong(**kw):
    y_TO = reference.moe_mlp(**kw)
    return torch.cat([y_TO[:-1], y_TO[-1:].roll(1, dims=1)])


def activation(name):
    return lambda **kw: reference.moe_mlp(**{**kw, "activation": name})


class _Scaled(torch.autograd.Function):
    """The identity, whose gradient is off in its largest element: half of a small one may be lost in rounding."""

    @staticmethod
    def forward(_ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(_ctx, grad):
        wrong = grad.clone()
        wrong.view(-1)[wrong.abs().argmax()] *= 1.5
        return wrong


def wrong_gradient(name):
    return lambda **kw: reference.moe_mlp(**{**kw, name: _Scaled.apply(kw[name])})


COARSE = [
    pytest.param(second_bias_not_gated, {}, "out", id="second-bias-not-multiplied-by-the-gate"),
    pytest.param(gate_dropped, {}, "out", id="gate-dropped"),
    pytest.param(first_choice_twice, {}, "out", id="first-choice-taken-twice"),
    pytest.param(one_token_wrong, {}, "out", id="one-token-wrong"),
    pytest.param(activation("quick_gelu"), {"activation": "gelu"}, "dw1_EFD", id="quick-gelu-for-gelu"),
    pytest.param(activation("gelu"), {"activation": "quick_gelu"}, "dw1_EFD", id="gelu-for-quick-gelu"),
    pytest.param(activation("relu"), {"activation": "silu"}, "out", id="relu-for-silu"),
    pytest.param(swapped_halves, {"gated": True, "activation": "silu"}, "out", id="gate-and-up-swapped"),
    *(
        pytest.param(wrong_gradient(name), {}, f"d{name}", id=f"one-element-wrong-in-the-gradient-of-{name}")
        for name in ("x_TD", "weight_TK", "w1_EFD", "w2_EOF", "b1_EF", "b2_EO")
    ),
]
FINE = [
    pytest.param(activation("gelu_tanh"), {"activation": "gelu"}, "out", id="tanh-for-exact-gelu"),
    pytest.param(activation("gelu"), {"activation": "gelu_tanh"}, "out", id="exact-for-tanh-gelu"),
]


@pytest.mark.parametrize(("mutant", "options", "tensor"), COARSE)
@FP32_AND_BF16
def test_wrong_layer_is_found_out(mutant, options, tensor, dtype, device):
    layer = make_layer(device, T=20, gated=options.get("gated", False), dtype=dtype)
    with pytest.raises(AssertionError, match=rf"(?m)^{tensor}: error .* in the (2|inf)-norm; worst at \("):
        assert_agrees("moe_mlp", layer, op=mutant, **options)


@pytest.mark.parametrize(("mutant", "options", "tensor"), FINE)
def test_slightly_different_activation_is_found_out_in_float32(mutant, options, tensor, device):
    with pytest.raises(AssertionError, match=rf"(?m)^{tensor}: error"):
        assert_agrees("moe_mlp", make_layer(device, T=20), op=mutant, **options)


@FP32_AND_BF16
def test_right_layer_passes(dtype, device):
    layer = make_layer(device, T=20, dtype=dtype)
    assert_agrees("moe_mlp", layer, op=reference.moe_mlp)


def unnormalized(**kw):
    return reference.topk_gating(**{**kw, "normalize": False})


def one_segment(**kw):
    routing = reference.topk_gating(**{**kw, "segment": None})
    return routing._replace(**{name: getattr(routing, name).expand(3, *getattr(routing, name).shape[1:])
                               for name in ("balance_S", "z_S", "mean_probs_SE")})  # fmt: skip


def ties_to_the_highest_index(logits_TE, top_k, **kw):
    routing = reference.topk_gating(logits_TE.flip(1), top_k, **kw)
    return routing._replace(expert_TK=logits_TE.shape[1] - 1 - routing.expert_TK)


def balance_over_all_choices(logits_TE, top_k, segment):
    routing, E = reference.topk_gating(logits_TE, top_k, segment), logits_TE.shape[1]
    chosen_TE = torch.nn.functional.one_hot(routing.expert_TK.long(), E).sum(dim=1) / top_k
    share_SE = chosen_TE.view(-1, segment, E).mean(dim=1).to(routing.balance_S.dtype)
    return routing._replace(balance_S=E * (routing.mean_probs_SE * share_SE).sum(dim=1))


@pytest.mark.parametrize(
    ("mutant", "tensor"),
    [
        pytest.param(unnormalized, "weight_TK", id="weights-not-normalized"),
        pytest.param(one_segment, "balance_S", id="losses-pooled-over-images"),
        pytest.param(ties_to_the_highest_index, "expert_TK", id="ties-to-the-highest-index"),
        pytest.param(balance_over_all_choices, "balance_S", id="balance-of-all-choices-not-the-first"),
    ],
)
def test_wrong_gating_is_found_out(mutant, tensor, device):
    logits_TE = torch.randn(30, 4, device=device)
    logits_TE[4] = 1.0
    with pytest.raises(AssertionError, match=rf"(?m)^{tensor}: "):
        assert_agrees("topk_gating", {"logits_TE": logits_TE}, op=mutant, top_k=2, segment=10)


def test_wrong_order_of_rows_is_found_out(device):
    plan = random_plan(20, 2, 3, device)
    mutant = lambda x_TD, plan: reference.permute(x_TD, plan).flip(0)  # noqa: E731
    with pytest.raises(AssertionError, match=r"(?m)^out: "):
        assert_agrees("permute", {"x_TD": torch.randn(20, 8, device=device)}, op=mutant, plan=plan)


def test_unwritten_memory_is_found_out(device):
    def half_written(**kw):
        y_TO = reference.moe_mlp(**kw)
        out_TO = torch.empty_like(y_TO)
        return torch.cat([y_TO[:10], out_TO[10:]])

    with pytest.raises(AssertionError, match="got nan"):
        assert_agrees("moe_mlp", make_layer(device, T=20), op=half_written)
