# SPDX-License-Identifier: Apache-2.0
"""Auxiliary losses of several MoE layers, as pure functions of what their routers returned.

Letters: S segments (image crops), E experts, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cumo_kernels import Routing
from cumo_kernels.checks import check_one_of

AUX_LOSSES = ("cumo", "switch")


class AuxLosses(NamedTuple):
    """Balance loss and z-loss, unweighted scalars in float32."""

    balance: Tensor
    z: Tensor


def routing_losses(routings: Sequence[Routing], group_sizes: Sequence[int], mode: str = "cumo") -> AuxLosses:
    """The losses of L layers, averaged over the layers, then over groups of segments (the scales of an image).

    "cumo" is that of the published CuMo (arXiv 2405.05949): the balance loss of each segment looks at first choices
    only, and is averaged over the segments of a group. "switch" is the one of Switch (arXiv 2101.03961, eq. 4)
    over all K choices, as transformers has it for Mixtral: E sum_e (choices of e per token) * mean p_e, with both
    means taken over all tokens of a group; it is K, not 1, where the load is even. The z-loss (ST-MoE,
    arXiv 2202.08906, eq. 5) is the same for both.

    Args:
        routings: one `Routing` per layer, of the same S segments.
        group_sizes: how many consecutive segments form each group; they add up to S.
        mode: "cumo" or "switch".

    Raises:
        ValueError: `routings` is empty, `group_sizes` does not add up to S, or `mode` is unknown.

    Examples:
        >>> import torch, cumo_kernels as ck
        >>> from cumo.nn.losses import routing_losses
        >>> even = ck.topk_gating(torch.eye(4) + torch.eye(4).roll(1, 0) / 2, top_k=2)  # both choices are even
        >>> [round(routing_losses([even], [1], mode).balance.item(), 4) for mode in ("cumo", "switch")]
        [1.0, 2.0]
    """
    check_one_of("mode", mode, AUX_LOSSES)
    if not routings:
        raise ValueError("routings: expected at least one layer, got none")
    segments = routings[0].balance_S.shape[0]
    if sum(group_sizes) != segments or min(group_sizes, default=0) < 1:
        raise ValueError(
            f"group_sizes: expected positive numbers that add up to {segments} segments, got {[*group_sizes]}"
        )
    z_LS = torch.stack([routing.z_S for routing in routings])
    if mode == "cumo":
        balance_LS = torch.stack([routing.balance_S for routing in routings])
        balances = [group_LS.mean() for group_LS in balance_LS.split(list(group_sizes), dim=1)]
    else:
        per_layer = torch.stack([_switch_balance(routing, group_sizes) for routing in routings])
        balances = list(per_layer.mean(dim=0))
    z = [group_LS.mean() for group_LS in z_LS.split(list(group_sizes), dim=1)]
    return AuxLosses(torch.stack(balances).mean(), torch.stack(z).mean())


def _switch_balance(routing: Routing, group_sizes: Sequence[int]) -> Tensor:
    """One balance loss per group, from all K choices."""
    S, E = routing.mean_probs_SE.shape
    expert_SN = routing.expert_TK.view(S, -1).long()
    counts_SE = torch.zeros_like(routing.mean_probs_SE).scatter_add_(
        1, expert_SN, torch.ones_like(expert_SN, dtype=routing.mean_probs_SE.dtype)
    )
    tokens = routing.expert_TK.shape[0] / S
    groups = zip(counts_SE.split(list(group_sizes)), routing.mean_probs_SE.split(list(group_sizes)), strict=True)
    return torch.stack([E * (counts.mean(dim=0) / tokens * probs.mean(dim=0)).sum() for counts, probs in groups])
