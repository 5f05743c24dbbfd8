# SPDX-License-Identifier: Apache-2.0
"""The registry: every operation with its variants, its operations in number and the least bytes that it moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import cumo_kernels as ck
from benchmarks import layers, peers
from benchmarks.variants import Call, MissingVariantError, Prepare, Variant, of_layer
from benchmarks.workloads import PASSES, LayerInputs, Workload
from cumo_kernels import reference


@dataclass(frozen=True)
class Operation:
    """An operation in several variants, of which "cumo" is ours."""

    name: str
    exact: Prepare
    variants: Mapping[str, Variant]
    flops: Callable[[Workload, str], int]
    bytes: Callable[[Workload, str, int], int]
    passes: tuple[str, ...] = field(default=PASSES)


def _bmm(inputs: LayerInputs) -> Call:
    x_END = layers.equal_shares(inputs)
    weights = [t for t in (inputs.w1_EFD, inputs.w2_EOF, inputs.b1_EF, inputs.b2_EO) if t is not None]
    return Call(lambda: layers.bmm(x_END, inputs), [x_END, *weights])


LAYER = Operation(
    "layer",
    of_layer(layers.exact),
    {
        "cumo": Variant(of_layer(layers.cumo), "ours"),
        "cumo_recompute": Variant(of_layer(partial(layers.cumo, recompute=True)), "ours"),
        "published_loop": Variant(of_layer(layers.published_loop)),
        "sorted_loop": Variant(of_layer(layers.sorted_loop)),
        "grouped_mm": Variant(of_layer(layers.grouped_mm)),
        "compiled_reference": Variant(of_layer(layers.compiled_reference)),
        **peers.PEERS,
        "bmm_bound": Variant(_bmm, "bound", exact=_bmm),
    },
    Workload.layer_flops,
    Workload.layer_bytes,
)


def _gate(inputs: LayerInputs) -> Tensor:
    """A router's weight [E, D]; the same for every variant."""
    case = inputs.workload.case
    generator = torch.Generator().manual_seed(1)
    gate = torch.randn(case.E, case.D, generator=generator) * case.D**-0.5
    return gate.to(inputs.x_TD.device, inputs.x_TD.dtype).requires_grad_()


def _routing_call(function: Callable[..., ck.Routing], inputs: LayerInputs) -> Call:
    gate_ED, case = _gate(inputs), inputs.workload.case
    segment = case.segment if case.segment and inputs.x_TD.shape[0] % case.segment == 0 else None

    def run() -> Tensor:
        routing = function(inputs.x_TD, gate_ED, case.K, segment)
        return torch.cat([routing.weight_TK.flatten(), routing.balance_S, routing.z_S])

    return Call(run, [inputs.x_TD, gate_ED])


def _routed(x_TD: Tensor, gate_ED: Tensor, top_k: int, segment: int | None) -> ck.Routing:
    """Ours: logits and gating in one pass, then the dispatch plan."""
    routing = ck.linear_topk_gating(x_TD, gate_ED, top_k, segment)
    ck.plan_dispatch(routing.expert_TK, gate_ED.shape[0])
    return routing


def _eagerly_routed(x_TD: Tensor, gate_ED: Tensor, top_k: int, segment: int | None) -> ck.Routing:
    """The same with operations of PyTorch."""
    logits_TE = F.linear(x_TD.float(), gate_ED.float()) if x_TD.dtype != torch.float64 else F.linear(x_TD, gate_ED)
    probs_TE = logits_TE.softmax(dim=-1)
    weight_TK, expert_TK = probs_TE.topk(top_k, dim=-1)
    weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True)
    E, S = gate_ED.shape[0], (segment or len(x_TD))
    first_SE = F.one_hot(expert_TK[:, 0], E).to(probs_TE.dtype).view(-1, S, E).mean(dim=1)
    mean_SE = probs_TE.view(-1, S, E).mean(dim=1)
    expert_TK.flatten().sort(stable=True)[1].argsort()
    expert_TK.flatten().bincount(minlength=E).cumsum(0)
    z_S = logits_TE.logsumexp(dim=-1).square().view(-1, S).mean(dim=1)
    return ck.Routing(weight_TK, expert_TK.int(), E * (first_SE * mean_SE).sum(dim=-1), z_S, mean_SE)


def _routing_flops(workload: Workload, which: str) -> int:
    case = workload.case
    return 2 * case.T * case.D * case.E * {"forward": 1, "backward": 2, "both": 3}[which]


def _routing_bytes(workload: Workload, which: str, itemsize: int) -> int:
    """The tokens, once in each direction and once more for the gate's gradient."""
    tokens = workload.case.T * workload.case.D * itemsize
    return tokens * {"forward": 1, "backward": 2, "both": 3}[which]


ROUTING = Operation(
    "routing",
    partial(_routing_call, reference.linear_topk_gating),
    {
        "cumo": Variant(partial(_routing_call, _routed), "ours"),
        "eager": Variant(partial(_routing_call, _eagerly_routed)),
    },
    _routing_flops,
    _routing_bytes,
)


def _plan(inputs: LayerInputs) -> ck.DispatchPlan:
    return ck.plan_dispatch(inputs.expert_TK, inputs.workload.case.E)


def _permute(function: Callable[[Tensor, ck.DispatchPlan], Tensor], inputs: LayerInputs) -> Call:
    plan = _plan(inputs)
    return Call(lambda: function(inputs.x_TD, plan), [inputs.x_TD])


def _rows_bytes(workload: Workload, which: str, itemsize: int) -> int:
    """Rows and tokens of width D, one read and the other written; a backward moves the same in the other direction."""
    moved = (workload.rows + workload.case.T) * workload.case.D * itemsize
    return moved * (2 if which == "both" else 1)


PERMUTE = Operation(
    "permute",
    partial(_permute, reference.permute),
    {
        "cumo": Variant(partial(_permute, ck.permute), "ours"),
        "index": Variant(partial(_permute, lambda x_TD, plan: x_TD[plan.token_N.long()])),
    },
    lambda _workload, _which: 0,
    _rows_bytes,
)


def _combine(function: Callable[[Tensor, Tensor, ck.DispatchPlan], Tensor], inputs: LayerInputs) -> Call:
    plan = _plan(inputs)
    y_NO = reference.permute(inputs.dy_TO, plan).contiguous().requires_grad_()
    return Call(lambda: function(y_NO, inputs.weight_TK, plan), [y_NO, inputs.weight_TK], inputs.dy_TO.flip(0))


def _combined(y_NO: Tensor, weight_TK: Tensor, plan: ck.DispatchPlan) -> Tensor:
    return (y_NO[plan.slot_TK.long()] * weight_TK.unsqueeze(-1)).sum(dim=1)


def _combine_bytes(workload: Workload, which: str, itemsize: int) -> int:
    case = workload.case
    forward = (workload.rows + case.T) * case.O
    backward = (2 * workload.rows + case.T) * case.O  # reads y for the gradient of the weights
    return itemsize * {"forward": forward, "backward": backward, "both": forward + backward}[which]


COMBINE = Operation(
    "combine",
    partial(_combine, reference.combine),
    {
        "cumo": Variant(partial(_combine, ck.combine), "ours"),
        "index": Variant(partial(_combine, _combined)),
    },
    lambda _workload, _which: 0,
    _combine_bytes,
)


def _up(function: Callable[[Tensor, LayerInputs, ck.DispatchPlan], Tensor], inputs: LayerInputs) -> Call:
    """The up projection with its bias, on rows that are sorted already."""
    plan = _plan(inputs)
    x_ND = reference.permute(inputs.x_TD.detach(), plan).contiguous().requires_grad_()
    leaves = [t for t in (x_ND, inputs.w1_EFD, inputs.b1_EF) if t is not None]
    return Call(lambda: function(x_ND, inputs, plan), leaves)


def _our_up(module: object, x_ND: Tensor, inputs: LayerInputs, plan: ck.DispatchPlan) -> Tensor:
    return module.grouped_gemm(x_ND, inputs.w1_EFD, plan, inputs.b1_EF)  # type: ignore[attr-defined, no-any-return]


def _torch_up(x_ND: Tensor, inputs: LayerInputs, plan: ck.DispatchPlan) -> Tensor:
    if not hasattr(F, "grouped_mm"):
        raise MissingVariantError("torch.nn.functional.grouped_mm came with a later PyTorch")
    offset_E = plan.offset_E1[1:]
    z_NF = F.grouped_mm(x_ND, inputs.w1_EFD.transpose(1, 2), offs=offset_E)
    if inputs.b1_EF is None:
        return z_NF
    row_N = torch.arange(len(x_ND), device=x_ND.device, dtype=torch.int32)
    return z_NF + inputs.b1_EF[torch.searchsorted(offset_E, row_N, right=True)]


def _looped_up(x_ND: Tensor, inputs: LayerInputs, plan: ck.DispatchPlan) -> Tensor:
    parts = x_ND.split(plan.offset_E1.diff().tolist())
    biases = [None] * len(parts) if inputs.b1_EF is None else inputs.b1_EF
    return torch.cat([F.linear(x, w, b) for x, w, b in zip(parts, inputs.w1_EFD, biases, strict=True)])


def _up_flops(workload: Workload, which: str) -> int:
    return 2 * workload.rows * workload.case.D * workload.up_width * {"forward": 1, "backward": 2, "both": 3}[which]


def _up_bytes(workload: Workload, which: str, itemsize: int) -> int:
    rows = workload.rows * (workload.case.D + workload.up_width)
    weights = min(workload.case.E, workload.rows) * workload.up_width * workload.case.D
    return itemsize * (rows + weights) * {"forward": 1, "backward": 2, "both": 3}[which]


GROUPED_GEMM = Operation(
    "grouped_gemm",
    partial(_up, partial(_our_up, reference)),
    {
        "cumo": Variant(partial(_up, partial(_our_up, ck)), "ours"),
        "loop": Variant(partial(_up, _looped_up)),
        "grouped_mm": Variant(partial(_up, _torch_up)),
    },
    _up_flops,
    _up_bytes,
)

OPERATIONS = {operation.name: operation for operation in (LAYER, ROUTING, PERMUTE, COMBINE, GROUPED_GEMM)}
