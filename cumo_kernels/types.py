# SPDX-License-Identifier: Apache-2.0
"""The two nouns of a Mixture-of-Experts layer: where tokens go (`Routing`) and how they are laid out (`DispatchPlan`).

Letters used as suffixes throughout the package: T tokens, K experts per token, N = T * K rows sorted by
expert, E experts, D input width, F hidden width, O output width, S segments (images) of equal size.

Both are named tuples, hence frozen, and containers that `torch.compile`, activation checkpointing and FSDP2
can look into.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cumo_kernels.checks import check_shapes


class Routing(NamedTuple):
    """What the router decided for each token, and its auxiliary losses.

    `weight_TK`, `mean_probs_SE` and both losses are differentiable with respect to the logits.

    Examples:
        >>> import torch, cumo_kernels as ck
        >>> routing = ck.topk_gating(torch.randn(6, 4), top_k=2, segment=3)  # two images of three tokens
        >>> {name: tuple(tensor.shape) for name, tensor in routing._asdict().items()}
        {'weight_TK': (6, 2), 'expert_TK': (6, 2), 'balance_S': (2,), 'z_S': (2,), 'mean_probs_SE': (2, 4)}
    """

    weight_TK: Tensor
    """`weight_TK[t, k]` = gate weight of token t's k-th choice, in the `probs_dtype` of the router."""
    expert_TK: Tensor
    """`expert_TK[t, k]` = expert of token t's k-th choice (int32), most probable first, of equal ones the lowest."""
    balance_S: Tensor
    """`balance_S[s]` = E sum_e (mean_t p[t, e]) (share of first choices that went to e), over segment s (float32; this
    and the next two are float64 if the logits are)."""
    z_S: Tensor
    """`z_S[s]` = mean over segment s of `logsumexp(logits[t]) ** 2` (float32)."""
    mean_probs_SE: Tensor
    """`mean_probs_SE[s, e]` = mean over segment s of p[t, e] (float32): what other balance losses are made of."""

    def validate(self, num_experts: int) -> None:
        """Check the invariants. Reads the tensors on the host, so it synchronises: for tests and debugging.

        Args:
            num_experts: E.

        Raises:
            ValueError: shapes disagree, or a token names an expert twice or out of range.
        """
        size = check_shapes(
            weight_TK=(self.weight_TK, "T K"),
            expert_TK=(self.expert_TK, "T K"),
            balance_S=(self.balance_S, "S"),
            z_S=(self.z_S, "S"),
            mean_probs_SE=(self.mean_probs_SE, "S E"),
        )
        if size["E"] != num_experts:
            raise ValueError(f"mean_probs_SE: expected E={num_experts}, got {list(self.mean_probs_SE.shape)}")
        if self.expert_TK.dtype != torch.int32:
            raise ValueError(f"expert_TK: expected int32, got {self.expert_TK.dtype}")
        expert_TK = self.expert_TK.cpu()
        if expert_TK.numel() and not 0 <= int(expert_TK.min()) <= int(expert_TK.max()) < num_experts:
            raise ValueError(f"expert_TK: expected ids in 0..{num_experts - 1}, got {expert_TK.unique().tolist()}")
        sorted_TK = expert_TK.sort(dim=1).values
        if size["K"] > 1 and bool((sorted_TK[:, 1:] == sorted_TK[:, :-1]).any()):
            raise ValueError("expert_TK: a token names the same expert twice")


class DispatchPlan(NamedTuple):
    """Tokens laid out in rows sorted by expert: a stable counting sort of `expert_TK`, without padding.

    Ids outside 0..E-1 (the sentinels of expert parallelism) are ignored: their rows stand last and belong to
    no expert.

    Examples:
        T = 3, K = 2, E = 3, with a sentinel:

        >>> import torch, cumo_kernels as ck
        >>> plan = ck.plan_dispatch(torch.tensor([[0, 2], [2, 0], [2, 3]], dtype=torch.int32), num_experts=3)
        >>> plan.offset_E1.tolist()  # experts 0, 1 and 2 own 2, 0 and 3 rows; the id 3 is ignored
        [0, 2, 2, 5]
        >>> plan.token_N.tolist()
        [0, 1, 0, 1, 2, -1]
        >>> plan.slot_TK.tolist()
        [[0, 2], [3, 1], [4, -1]]
    """

    token_N: Tensor
    """`token_N[n]` = token whose copy stands in row n (int32); -1 in rows of no expert."""
    route_N: Tensor
    """`route_N[n]` = t * K + k of the choice in row n (int32): a permutation of 0..N-1, ignored choices last."""
    slot_TK: Tensor
    """`slot_TK[t, k]` = row that holds token t's k-th choice (int32), -1 if that choice is ignored."""
    offset_E1: Tensor
    """Rows of expert e are `offset_E1[e] : offset_E1[e + 1]` (int32); rows from `offset_E1[E]` on belong to none."""

    @property
    def num_experts(self) -> int:
        """E, the number of experts."""
        return self.offset_E1.shape[0] - 1

    def validate(self) -> None:
        """Check the invariants. Reads the tensors on the host, so it synchronises: for tests and debugging.

        The operations check shapes, dtypes and devices only, and trust the values.

        Raises:
            ValueError: one of them does not hold.
        """
        size = check_shapes(
            token_N=(self.token_N, "N"),
            route_N=(self.route_N, "N"),
            slot_TK=(self.slot_TK, "T K"),
            offset_E1=(self.offset_E1, "E1"),
        )
        for name, tensor in self._asdict().items():
            if tensor.dtype != torch.int32:
                raise ValueError(f"{name}: expected int32, got {tensor.dtype}")
        N, K = size["N"], size["K"]
        if size["T"] * K != N:
            raise ValueError(f"token_N: N={N}, but slot_TK has T * K = {size['T'] * K}")
        token_N, route_N, slot_N, offset_E1 = (t.cpu().long().flatten() for t in self)
        if int(offset_E1[0]) != 0 or bool((offset_E1.diff() < 0).any()) or int(offset_E1[-1]) > N:
            raise ValueError(f"offset_E1: must rise from 0 to at most N={N}, got {offset_E1.tolist()}")
        row_N = torch.arange(N)
        used_N = row_N < offset_E1[-1]
        if not torch.equal(route_N.sort().values, row_N):
            raise ValueError("route_N: not a permutation of 0..N-1")
        if not torch.equal(token_N, torch.where(used_N, route_N // K, -1)):
            raise ValueError("token_N: must be route_N // K in rows of an expert and -1 in the others")
        if not torch.equal(slot_N[route_N], torch.where(used_N, row_N, -1)):
            raise ValueError("slot_TK: not the inverse of route_N")
        for e in range(self.num_experts):
            if bool((route_N[offset_E1[e] : offset_E1[e + 1]].diff() <= 0).any()):
                raise ValueError(f"route_N: rows of expert {e} are not in the order of the tokens")
