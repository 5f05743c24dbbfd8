# SPDX-License-Identifier: Apache-2.0
"""Auxiliary losses over layers and scales, against their definitions written out."""

import pytest
import torch
import torch.nn.functional as F

import cumo_kernels as ck
from cumo.nn.losses import routing_losses

S, TOKENS, E, K, LAYERS = 5, 7, 4, 2, 3
GROUPS = [2, 3]


@pytest.fixture
def layers():
    """Logits of three layers over five segments, with a skew, and their routings."""
    torch.manual_seed(0)
    logits = [torch.randn(S * TOKENS, E, requires_grad=True) for _ in range(LAYERS)]
    skew = torch.tensor([1.0, 0.5, 0.0, -0.5])
    return logits, [ck.topk_gating(layer + skew, K, segment=TOKENS) for layer in logits], skew


def by_definition(logits_TE, mode):
    """Balance and z of one layer and group."""
    probs_TE = logits_TE.softmax(dim=-1)
    choices = probs_TE.topk(K).indices
    z = logits_TE.logsumexp(dim=-1).square().mean()
    if mode == "switch":
        share_E = F.one_hot(choices, E).sum(dim=1).float().mean(dim=0)
        return E * (share_E * probs_TE.mean(dim=0)).sum(), z
    probs_SE = probs_TE.view(-1, TOKENS, E).mean(dim=1)
    share_SE = F.one_hot(choices[:, 0], E).float().view(-1, TOKENS, E).mean(dim=1)
    return (probs_SE * share_SE).mean() * E**2, z


@pytest.mark.parametrize("mode", ["cumo", "switch"])
def test_losses_and_gradients_are_those_of_the_definition(layers, mode):
    logits, routings, skew = layers
    losses = routing_losses(routings, GROUPS, mode)
    groups = [[group for group in (layer + skew).split([g * TOKENS for g in GROUPS])] for layer in logits]
    expected = torch.stack(
        [torch.stack([*map(torch.stack, [by_definition(g, mode) for g in layer])]) for layer in groups]
    )
    balance, z = expected.mean(dim=0).mean(dim=0)
    torch.testing.assert_close(losses.balance, balance)
    torch.testing.assert_close(losses.z, z)
    actual = torch.autograd.grad(0.1 * losses.balance + 0.01 * losses.z, logits)
    wanted = torch.autograd.grad(0.1 * balance + 0.01 * z, logits)
    for a, w in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, w)


def test_the_modes_differ(layers):
    _, routings, _ = layers
    assert not torch.isclose(routing_losses(routings, [S]).balance, routing_losses(routings, [S], "switch").balance)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [1]), "routings: expected at least one layer"),
        (("routings", [2, 2]), "group_sizes: expected positive numbers that add up to 5 segments, got"),
        (("routings", [5, 0]), "group_sizes: expected positive numbers"),
        (("routings", [5], "hash"), "mode: expected one of"),
    ],
    ids=["no layers", "too few segments", "an empty group", "unknown mode"],
)
def test_bad_arguments_are_named(layers, arguments, message):
    arguments = [layers[1] if argument == "routings" else argument for argument in arguments]
    with pytest.raises(ValueError, match=message):
        routing_losses(*arguments)
