# SPDX-License-Identifier: Apache-2.0
"""What the layer should compute, one token and one choice at a time, in float64.

Written from the equations, not from `cumo_kernels.reference`, which these loops judge. Nothing here is fast or
differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _gelu(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def _gelu_tanh(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": lambda x: x * _logistic(1.702 * x),
    "silu": lambda x: x * _logistic(x),
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
}


def _softmax(logits: list[float]) -> list[float]:
    exps = [math.exp(logit - max(logits)) for logit in logits]
    return [value / sum(exps) for value in exps]


def gating(logits_TE: Tensor, top_k: int, segment: int | None = None, normalize: bool = True) -> dict[str, Tensor]:
    """The fields of `Routing`."""
    T, E = logits_TE.shape
    segment = segment or max(T, 1)
    weights, experts, balances, zs, means = [], [], [], [], []
    for start in range(0, T, segment):
        prob_sum, first_count, z_sum = [0.0] * E, [0] * E, 0.0
        for logits in logits_TE[start : start + segment].tolist():
            probs = _softmax(logits)
            chosen = sorted(range(E), key=lambda e: (-probs[e], e))[:top_k]
            total = sum(probs[e] for e in chosen) if normalize else 1.0
            weights.append([probs[e] / total for e in chosen])
            experts.append(chosen)
            prob_sum = [a + b for a, b in zip(prob_sum, probs, strict=True)]
            first_count[chosen[0]] += 1
            z_sum += math.log(sum(math.exp(logit) for logit in logits)) ** 2
        balances.append(E * sum(p / segment * c / segment for p, c in zip(prob_sum, first_count, strict=True)))
        zs.append(z_sum / segment)
        means.append([p / segment for p in prob_sum])
    return {
        "weight_TK": torch.tensor(weights, dtype=torch.float64).view(T, top_k),
        "expert_TK": torch.tensor(experts, dtype=torch.int32).view(T, top_k),
        "balance_S": torch.tensor(balances or [0.0], dtype=torch.float64),
        "z_S": torch.tensor(zs or [0.0], dtype=torch.float64),
        "mean_probs_SE": torch.tensor(means or [[0.0] * E], dtype=torch.float64),
    }


def plan(expert_TK: Tensor, num_experts: int) -> dict[str, Tensor]:
    """The fields of `DispatchPlan`, by filling one bucket per expert."""
    T, K = expert_TK.shape
    buckets: list[list[int]] = [[] for _ in range(num_experts + 1)]
    for i, expert in enumerate(expert_TK.flatten().tolist()):
        buckets[expert if 0 <= expert < num_experts else num_experts].append(i)
    offset = [0]
    for bucket in buckets[:-1]:
        offset.append(offset[-1] + len(bucket))
    route = [i for bucket in buckets for i in bucket]
    slot = [-1] * (T * K)
    for row, i in enumerate(route[: offset[-1]]):
        slot[i] = row
    token = [i // K if row < offset[-1] else -1 for row, i in enumerate(route)]
    fields = {"token_N": token, "route_N": route, "slot_TK": slot, "offset_E1": offset}
    tensors = {name: torch.tensor(values, dtype=torch.int32) for name, values in fields.items()}
    return {**tensors, "slot_TK": tensors["slot_TK"].view(T, K)}


def expert_mlp(
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    w1_EFD: Tensor,
    w2_EOF: Tensor,
    b1_EF: Tensor | None = None,
    b2_EO: Tensor | None = None,
    activation: str = "gelu",
    gated: bool = False,
    residual_TO: Tensor | None = None,
) -> Tensor:
    """y[t] = residual[t] + sum_k weight[t, k] (W2[e] a(W1[e] x[t] + b1[e]) + b2[e]) with e = expert[t, k]."""
    f = ACTIVATIONS[activation]
    E, O, width = w2_EOF.shape
    y_TO = torch.zeros(x_TD.shape[0], O, dtype=torch.float64)
    for t, experts in enumerate(expert_TK.tolist()):
        if residual_TO is not None:
            y_TO[t] += residual_TO[t].double()
        for k, e in enumerate(experts):
            if not 0 <= e < E:
                continue
            z = (w1_EFD[e].double() * x_TD[t].double()).sum(dim=1)
            if b1_EF is not None:
                z += b1_EF[e].double()
            a = torch.tensor([f(value) for value in z[:width].tolist()], dtype=torch.float64)
            if gated:
                a *= z[width:]
            y = (w2_EOF[e].double() * a).sum(dim=1)
            if b2_EO is not None:
                y += b2_EO[e].double()
            y_TO[t] += weight_TK[t, k].double() * y
    return y_TO


def published_router(logits_BNE: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The router of the published CuMo, in the dtype of its activations: softmax in float32, cast, top-K of what was
    cast, renormalise; and its losses, which average over images. Returns weights, experts, balance and z-loss."""
    E = logits_BNE.shape[-1]
    probs = F.softmax(logits_BNE, dim=-1, dtype=torch.float32).to(logits_BNE.dtype)
    weights, experts = torch.topk(probs, top_k)
    first = F.one_hot(experts[..., 0], E).to(torch.float32)
    balance = (probs.mean(dim=1) * first.mean(dim=1)).mean() * E**2
    z = torch.logsumexp(logits_BNE, dim=-1).square().mean()
    return weights / weights.sum(dim=-1, keepdim=True), experts, balance, z
