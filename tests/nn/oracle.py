# SPDX-License-Identifier: Apache-2.0
"""`MoEMLP` as a loop over tokens, in the dtype of its arguments: in float64 it is exact, otherwise plain eager mode.

Written from the equations; of the module under test it reads the parameters and the configuration, nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cumo.nn import MoEMLP

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
}


def expert(moe: MoEMLP, parameters: Mapping[str, Tensor], e: int, x_D: Tensor) -> Tensor:
    """The output of expert e for one token."""
    up_bias, down_bias = parameters.get("up_proj_bias"), parameters.get("down_proj_bias")
    z = F.linear(x_D, parameters["up_proj"][e], None if up_bias is None else up_bias[e])
    a = ACTIVATIONS[moe.activation](z[: moe.d_hidden])
    if moe.gated:
        a = a * z[moe.d_hidden :]
    return F.linear(a, parameters["down_proj"][e], None if down_bias is None else down_bias[e])


def token_loop(moe: MoEMLP, parameters: Mapping[str, Tensor], x_BSD: Tensor) -> dict[str, Tensor]:
    """Output and losses; the losses are averaged over the S tokens of each of B images. The router computes in
    float32, or float64."""
    router_dtype = torch.float64 if x_BSD.dtype == torch.float64 else torch.float32
    logits_BSE = x_BSD.to(router_dtype) @ parameters["gate.weight"].to(router_dtype).T
    probs_BSE = logits_BSE.softmax(-1)
    weight_BSK, expert_BSK = probs_BSE.topk(moe.top_k)
    if moe.normalize:
        weight_BSK = weight_BSK / weight_BSK.sum(-1, keepdim=True)
    images = []
    for x_SD, weight_SK, expert_SK in zip(x_BSD, weight_BSK, expert_BSK, strict=True):
        tokens = []
        for x_D, weight_K, expert_K in zip(x_SD, weight_SK, expert_SK.tolist(), strict=True):
            choices = [w * expert(moe, parameters, e, x_D) for w, e in zip(weight_K, expert_K, strict=True)]
            tokens.append(torch.stack(choices).sum(0))
        images.append(torch.stack(tokens))
    share_BE = F.one_hot(expert_BSK[..., 0], moe.num_experts).to(router_dtype).mean(1)
    return {
        "y": torch.stack(images).to(x_BSD.dtype),
        "balance_S": moe.num_experts * (probs_BSE.mean(1) * share_BE).sum(-1),
        "z_S": logits_BSE.logsumexp(-1).square().mean(1),
        "mean_probs_SE": probs_BSE.mean(1),
    }


def with_gradients(outputs: dict[str, Tensor], leaves: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """The outputs, and the gradients of the leaves for one random cotangent of all outputs together."""
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(y.shape, generator=generator).to(y.device, y.dtype) for y in outputs.values()]
    for leaf in leaves.values():
        leaf.grad = None
    torch.autograd.backward(list(outputs.values()), cotangents)  # `autograd.grad` refuses reentrant checkpoints
    return outputs | {f"grad.{name}": leaf.grad for name, leaf in leaves.items()}


def by_loop(moe: MoEMLP, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and all gradients of the loop, computed in `dtype`."""
    leaves = {"x": x, **dict(moe.named_parameters())}
    leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in leaves.items()}
    return with_gradients(token_loop(moe, leaves, leaves["x"]), leaves)


def by_module(moe: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Outputs and all gradients of the module, or of something that stands for it."""
    leaves = {"x": x.detach().clone().requires_grad_(), **dict(moe.named_parameters())}
    y, routing = moe(leaves["x"])
    outputs = {"y": y, **{name: getattr(routing, name) for name in ("balance_S", "z_S", "mean_probs_SE")}}
    return with_gradients(outputs, leaves)
