# SPDX-License-Identifier: Apache-2.0
"""Implementations of the expert layer, each a function from `LayerInputs` to y [T, O]: ours, baselines and a bound."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import cumo_kernels as ck
from benchmarks.variants import MissingVariantError
from benchmarks.workloads import LayerInputs
from cumo_kernels import reference
from cumo_kernels.activations import ACTIVATIONS


def cumo(inputs: LayerInputs, recompute: bool = False) -> Tensor:
    """Ours, with the backend of the device."""
    case = inputs.workload.case
    return ck.moe_mlp(
        inputs.x_TD, inputs.weight_TK, inputs.expert_TK, inputs.w1_EFD, inputs.w2_EOF, inputs.b1_EF, inputs.b2_EO,
        activation=case.activation, gated=case.gated, recompute=recompute,
    )  # fmt: skip


def exact(inputs: LayerInputs) -> Tensor:
    """The reference, in the dtype of the inputs, with which every variant is compared."""
    with ck.use_backend("reference"):
        return cumo(inputs)


def activated(z: Tensor, inputs: LayerInputs) -> Tensor:
    """The activation between the two products of an expert, times the up projection if gated."""
    act = ACTIVATIONS[inputs.workload.case.activation]
    if not inputs.workload.case.gated:
        return act(z)
    gate, up = z.chunk(2, dim=-1)
    return act(gate) * up


def _expert(x: Tensor, e: int, inputs: LayerInputs) -> Tensor:
    """Expert `e` on its tokens, as two linear layers."""
    b1 = None if inputs.b1_EF is None else inputs.b1_EF[e]
    b2 = None if inputs.b2_EO is None else inputs.b2_EO[e]
    return F.linear(activated(F.linear(x, inputs.w1_EFD[e], b1), inputs), inputs.w2_EOF[e], b2)


def published_loop(inputs: LayerInputs) -> Tensor:
    """The loop of the published CuMo (arXiv 2405.05949) over images and experts, each with a host synchronisation."""
    case = inputs.workload.case
    y_TO = inputs.x_TD.new_zeros(case_tokens(inputs), case.O)
    segment = case.segment or case_tokens(inputs)
    for start in range(0, case_tokens(inputs), segment):
        image = slice(start, start + segment)
        for e in range(case.E):
            token, choice = torch.where(inputs.expert_TK[image] == e)
            y_e = _expert(inputs.x_TD[image][token], e, inputs)
            y_TO[image] = y_TO[image].index_add(0, token, inputs.weight_TK[image][token, choice, None] * y_e)
    return y_TO


def case_tokens(inputs: LayerInputs) -> int:
    """T."""
    return inputs.x_TD.shape[0]


def sorted_loop(inputs: LayerInputs) -> Tensor:
    """Sort once, then one pair of matrix products per expert, whose token counts the host reads."""
    expert_N, route_N = inputs.expert_TK.flatten().long().sort(stable=True)
    counts = expert_N.bincount(minlength=inputs.workload.case.E).tolist()
    token_N = route_N // inputs.expert_TK.shape[1]
    rows = inputs.x_TD[token_N].split(counts)
    y_NO = torch.cat([_expert(x, e, inputs) for e, x in enumerate(rows) if len(x)])
    weighted = y_NO * inputs.weight_TK.flatten()[route_N, None]
    return inputs.x_TD.new_zeros(case_tokens(inputs), y_NO.shape[1]).index_add(0, token_N, weighted)


def grouped_mm(inputs: LayerInputs) -> Tensor:
    """The default of transformers: sort, gather, torch's grouped matrix product, bias by index, un-sort."""
    if not hasattr(F, "grouped_mm"):
        raise MissingVariantError("torch.nn.functional.grouped_mm came with a later PyTorch")
    T, K = inputs.expert_TK.shape
    expert_N, route_N = inputs.expert_TK.flatten().long().sort(stable=True)
    offset_E = torch.searchsorted(
        expert_N, torch.arange(inputs.workload.case.E, device=expert_N.device), right=True, out_int32=True
    )
    z_NF = F.grouped_mm(inputs.x_TD[route_N // K], inputs.w1_EFD.transpose(1, 2), offs=offset_E)
    if inputs.b1_EF is not None:
        z_NF = z_NF + inputs.b1_EF[expert_N]
    y_NO = F.grouped_mm(activated(z_NF, inputs), inputs.w2_EOF.transpose(1, 2), offs=offset_E)
    if inputs.b2_EO is not None:
        y_NO = y_NO + inputs.b2_EO[expert_N]
    weighted = y_NO * inputs.weight_TK.flatten()[route_N, None]
    return weighted[route_N.argsort()].view(T, K, -1).sum(dim=1)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    # a backward by itself is run again and again on the graph of one forward
    torch._functorch.config.donated_buffer = False
    return torch.compile(reference.moe_mlp)


def compiled_reference(inputs: LayerInputs) -> Tensor:
    """Our eager reference under `torch.compile`."""
    case = inputs.workload.case
    return _compiled()(
        inputs.x_TD, inputs.weight_TK, inputs.expert_TK, inputs.w1_EFD, inputs.w2_EOF, inputs.b1_EF, inputs.b2_EO,
        case.activation, case.gated,
    )  # fmt: skip


def bmm(x_END: Tensor, inputs: LayerInputs) -> Tensor:
    """Dense batched products of the same size, with equal shares of rows and without routing, gather or combine."""
    if inputs.b1_EF is None:
        z = torch.bmm(x_END, inputs.w1_EFD.transpose(1, 2))
    else:
        z = torch.baddbmm(inputs.b1_EF.unsqueeze(1), x_END, inputs.w1_EFD.transpose(1, 2))
    a = activated(z, inputs)
    if inputs.b2_EO is None:
        return torch.bmm(a, inputs.w2_EOF.transpose(1, 2))
    return torch.baddbmm(inputs.b2_EO.unsqueeze(1), a, inputs.w2_EOF.transpose(1, 2))


def equal_shares(inputs: LayerInputs) -> Tensor:
    """Input of `bmm` [E, ceil(N / E), D]: the tokens in their order, repeated."""
    case = inputs.workload.case
    rows = -(-case_tokens(inputs) * case.K // case.E)
    token = torch.arange(case.E * rows, device=inputs.x_TD.device) % case_tokens(inputs)
    x_END = inputs.x_TD.detach()[token].view(case.E, rows, case.D)
    return x_END.requires_grad_(inputs.x_TD.requires_grad)
