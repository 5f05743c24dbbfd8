# SPDX-License-Identifier: Apache-2.0
"""The operations as loops over experts and tokens that autograd differentiates, in the dtype of their arguments.

In float64 they are exact, otherwise plain eager mode. Written from the equations, not from `cumo_kernels.reference`,
which they judge; their signatures are those of the public operations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cumo_kernels.types import DispatchPlan, Routing
from tests.nn import oracle

ACTIVATIONS = {None: lambda z: z, **oracle.ACTIVATIONS}


def wide(tensor: Tensor) -> Tensor:
    """In float32, or in float64 if it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _nothing_of(*tensors: Tensor | None) -> Tensor:
    """0, but to autograd a function of every tensor, also of those that no token came to."""
    return sum((t.flatten()[:0].sum().double() for t in tensors if t is not None), torch.zeros((), dtype=torch.float64))


def topk_gating(
    logits_TE: Tensor,
    top_k: int,
    segment: int | None = None,
    normalize: bool = True,
    probs_dtype: torch.dtype = torch.float32,
) -> Routing:
    """Segment by segment; an expert is preferred for its probability, then for its lower index, NaN above all."""
    T, E = logits_TE.shape
    segment = T if segment is None else segment
    S = T // segment if segment else 1
    exact = logits_TE.dtype == torch.float64
    logits_TE = wide(logits_TE)
    probs_TE = logits_TE.softmax(1)
    if not exact:
        probs_TE = probs_TE.to(probs_dtype)
    elif probs_dtype != torch.float32:  # rounded, but what follows is exact, gradients too
        probs_TE = probs_TE + (probs_TE.to(probs_dtype).double() - probs_TE).detach()
    ranks = probs_TE.detach().nan_to_num(nan=2.0).tolist()
    experts = [sorted(range(E), key=lambda e, rank=rank: (-rank[e], e))[:top_k] for rank in ranks]
    expert_TK = torch.tensor(experts, device=logits_TE.device).view(T, top_k)
    weight_TK = probs_TE.gather(1, expert_TK.long())
    weight_TK = weight_TK / weight_TK.sum(1, keepdim=True) if normalize else weight_TK
    balances, zs, means = [], [], []
    for s in range(S):
        of_segment = slice(s * segment, (s + 1) * segment)
        mean_probs_E = probs_TE[of_segment].to(logits_TE.dtype).sum(0) / max(segment, 1)
        share_E = F.one_hot(expert_TK[of_segment, 0].long(), E).to(logits_TE.dtype).sum(0) / max(segment, 1)
        balances.append(E * (mean_probs_E * share_E).sum())
        zs.append((logits_TE[of_segment].logsumexp(1) ** 2).sum() / max(segment, 1))
        means.append(mean_probs_E)
    if not S:
        none_E = logits_TE.sum(0)
        return Routing(weight_TK, expert_TK.int(), none_E.sum().expand(0), none_E.sum().expand(0), none_E.expand(0, E))
    return Routing(weight_TK, expert_TK.int(), torch.stack(balances), torch.stack(zs), torch.stack(means))


def linear_topk_gating(x_TD: Tensor, gate_ED: Tensor, *options: object, **named: object) -> Routing:
    """`topk_gating` of the logits."""
    return topk_gating((wide(gate_ED).to(wide(x_TD).dtype) @ wide(x_TD).T).T, *options, **named)


def permute(x_TD: Tensor, plan: DispatchPlan) -> Tensor:
    """Choice by choice of each token."""
    token_N1 = plan.token_N.unsqueeze(1)
    rows_ND = torch.zeros_like(x_TD[:1]).expand(len(plan.token_N), -1) if len(x_TD) else x_TD
    for t in range(len(x_TD)):
        rows_ND = torch.where(token_N1 == t, x_TD[t], rows_ND)
    return rows_ND


def grouped_gemm(
    x_ND: Tensor, w_EFD: Tensor, plan: DispatchPlan, bias_EF: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """Expert by expert."""
    bounds = plan.offset_E1.tolist()
    parts = []
    for e, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        z = F.linear(x_ND[start:end], w_EFD[e], None if bias_EF is None else bias_EF[e])
        parts.append(ACTIVATIONS[activation](z))
    parts.append(x_ND.new_zeros(x_ND.shape[0] - bounds[-1], w_EFD.shape[1]))
    return torch.cat(parts) + _nothing_of(x_ND, w_EFD, bias_EF).to(x_ND.dtype)


def combine(y_NO: Tensor, weight_TK: Tensor, plan: DispatchPlan, residual_TO: Tensor | None = None) -> Tensor:
    """The k-th choices of all tokens, then the next."""
    T, K = plan.slot_TK.shape
    total_TO = wide(y_NO).new_zeros(T, y_NO.shape[1]) if residual_TO is None else wide(residual_TO)
    for k in range(K):
        t = (plan.slot_TK[:, k] >= 0).nonzero()[:, 0]
        weight = wide(weight_TK[t, k]).to(total_TO.dtype).unsqueeze(1)
        total_TO = total_TO.index_add(0, t, weight * wide(y_NO[plan.slot_TK[t, k].long()]))
    return (total_TO + _nothing_of(y_NO, weight_TK, residual_TO).to(total_TO.dtype)).to(y_NO.dtype)


def moe_mlp(
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    w1_EFD: Tensor,
    w2_EOF: Tensor,
    b1_EF: Tensor | None = None,
    b2_EO: Tensor | None = None,
    activation: str = "gelu",
    gated: bool = False,
    recompute: bool = False,  # noqa: ARG001  (what is kept changes no number)
    residual_TO: Tensor | None = None,
) -> Tensor:
    """Expert by expert, and among its tokens choice by choice."""
    E, O, width = w2_EOF.shape
    total_TO = wide(x_TD).new_zeros(x_TD.shape[0], O) if residual_TO is None else wide(residual_TO)
    for e in range(E):
        for k in range(expert_TK.shape[1]):
            t = (expert_TK[:, k] == e).nonzero()[:, 0]
            z = F.linear(x_TD[t], w1_EFD[e], None if b1_EF is None else b1_EF[e])
            a = ACTIVATIONS[activation](z[:, :width])
            y = F.linear(a * z[:, width:] if gated else a, w2_EOF[e], None if b2_EO is None else b2_EO[e])
            weight = wide(weight_TK[t, k]).to(total_TO.dtype).unsqueeze(1)
            total_TO = total_TO.index_add(0, t, weight * wide(y))
    nothing = _nothing_of(x_TD, weight_TK, w1_EFD, w2_EOF, b1_EF, b2_EO, residual_TO)
    return (total_TO + nothing.to(total_TO.dtype)).to(x_TD.dtype)
