# SPDX-License-Identifier: Apache-2.0
"""One small adapter for the layer of each other library. This project installs none of them.

An adapter fits the version that it names: the names, order and layout of arguments were compared with its source. With
another version it may fail, which its row then says.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks import layers
from benchmarks.variants import Call, MissingVariantError, Variant, of_layer
from benchmarks.workloads import LayerInputs


def _imported(name: str) -> ModuleType:
    try:
        return import_module(name)
    except Exception as error:  # noqa: BLE001  their import may fail in any way; all of them mean that it is not here
        raise MissingVariantError(f"{name} cannot be imported: {type(error).__name__}: {error}") from error


def _demand(condition: bool, reason: str) -> None:
    if not condition:
        raise MissingVariantError(reason)


def scattermoe(inputs: LayerInputs) -> Tensor:
    """ScatterMoE (arXiv 2403.08245; shawntan/scattermoe at 2d15f31).

    Its backward overwrites what its forward saved: gradients are right the first time only, which is when they are
    compared; later runs on the same graph, as in the pass "backward", do the same work.
    """
    experts = _imported("scattermoe.parallel_experts")
    case = inputs.workload.case
    sorted_N, scattered_N, offset_E = experts.flatten_sort_count(inputs.expert_TK.long(), num_experts=case.E)
    layout = sorted_N, scattered_N, offset_E
    z_NF = experts.parallel_linear(
        inputs.x_TD, inputs.w1_EFD.permute(0, 2, 1), case.K, *layout, expert_biases=inputs.b1_EF, grouped_out=True
    )
    return experts.parallel_linear(
        layers.activated(z_NF, inputs), inputs.w2_EOF.permute(0, 2, 1), 1, *layout, expert_biases=inputs.b2_EO,
        gates=inputs.weight_TK, grouped_in=True,
    )  # fmt: skip


def liger(inputs: LayerInputs) -> Tensor:
    """Liger-Kernel (liger-kernel 0.8.5): SwiGLU without biases."""
    fused_moe = _imported("liger_kernel.ops.fused_moe")
    case = inputs.workload.case
    _demand(case.gated and case.activation == "silu" and not case.bias, "liger computes SwiGLU without biases only")
    return fused_moe.LigerFusedMoEFunction.apply(
        inputs.x_TD, inputs.w1_EFD, inputs.w2_EOF, inputs.expert_TK, inputs.weight_TK
    )


def megablocks(inputs: LayerInputs) -> Tensor:
    """The grouped path of MegaBlocks (arXiv 2211.15841; megablocks 0.10.0): gather, matrix products, scatter. The host
    reads the number of rows of each expert."""
    ops, gmm = _imported("megablocks.ops"), _imported("grouped_gemm").ops.gmm
    case = inputs.workload.case
    _demand(not case.bias, "megablocks has one bias for all experts together")
    expert_N = inputs.expert_TK.flatten()
    bin_ids, indices = ops.sort(expert_N, max(case.E - 1, 1).bit_length())
    counts_E = ops.histogram(expert_N, case.E)
    bins = ops.inclusive_cumsum(counts_E, 0)
    sizes = counts_E.cpu().long()
    x_ND = ops.gather(inputs.x_TD, indices, bin_ids, bins, case.K)
    a_NF = layers.activated(gmm(x_ND, inputs.w1_EFD, sizes, trans_b=True), inputs)
    y_NO = gmm(a_NF, inputs.w2_EOF, sizes, trans_b=True)
    return ops.scatter(y_NO, indices, bin_ids, inputs.weight_TK.flatten(), bins, case.K)


def unsloth(inputs: LayerInputs) -> Tensor:
    """Unsloth's grouped GEMM (unsloth 2026.10.9) through its public function, which tunes tiles on its first call."""
    interface = _imported("unsloth.kernels.moe.grouped_gemm.interface")
    case = inputs.workload.case
    _demand(not case.bias, "unsloth's grouped GEMM has no biases")
    T, K = inputs.expert_TK.shape
    expert_N = inputs.expert_TK.flatten()
    sizes_E = expert_N.bincount(minlength=case.E).int()
    common: dict[str, Any] = {
        "m_sizes": sizes_E,
        "topk": K,
        "gather_indices": expert_N.sort(stable=True).indices.int(),
        "autotune": True,
    }
    z_NF = interface.grouped_gemm(inputs.x_TD, inputs.w1_EFD, permute_x=True, is_first_gemm=True, **common)
    a_NF = layers.activated(z_NF, inputs)
    y_NO = interface.grouped_gemm(a_NF, inputs.w2_EOF, permute_y=True, is_first_gemm=False, **common)
    return (y_NO.view(T, K, -1) * inputs.weight_TK.unsqueeze(-1)).sum(dim=1)


def _interleaved(w1_EFD: Tensor) -> Tensor:
    """Rows gate 0, up 0, gate 1, up 1, ..."""
    gate, up = w1_EFD.detach().chunk(2, dim=1)
    return torch.stack([gate, up], dim=2).flatten(1, 2).requires_grad_(w1_EFD.requires_grad)


def _sonic_leaves(inputs: LayerInputs, w1_EFD: Tensor) -> list[Tensor]:
    return [inputs.x_TD, inputs.weight_TK, w1_EFD, inputs.w2_EOF]


def _sonic(inputs: LayerInputs) -> Call:
    """SonicMoE (arXiv 2512.14080; sonic-moe 0.1.2.post1). Its gate and up rows alternate, an order that is made before
    anything is timed."""
    functional, enums = _imported("sonicmoe.functional"), _imported("sonicmoe.enums")
    case = inputs.workload.case
    _demand(case.gated and case.activation == "silu" and not case.bias, "sonicmoe has no exact GELU and no quick_gelu")
    T, K = inputs.expert_TK.shape
    token_N = torch.arange(T, device=inputs.x_TD.device, dtype=torch.int32).repeat_interleave(K)
    w1_EFD = _interleaved(inputs.w1_EFD)

    def run() -> Tensor:
        stream = torch.cuda.current_stream().cuda_stream
        y_TO, _ = functional.moe_general_routing_inputs(
            inputs.x_TD, inputs.weight_TK.flatten(), token_N, inputs.expert_TK.flatten(), w1_EFD.permute(1, 2, 0), None,
            inputs.w2_EOF.permute(1, 2, 0), None, case.E, stream, enums.ActivationType.SWIGLU,
        )  # fmt: skip
        return y_TO

    return Call(run, _sonic_leaves(inputs, w1_EFD), inputs.dy_TO)


def _sonic_exact(inputs: LayerInputs) -> Call:
    """The reference on the same interleaved rows."""
    w1_EFD = _interleaved(inputs.w1_EFD)

    def run() -> Tensor:
        straight = w1_EFD.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
        return layers.exact(inputs.with_up_projection(straight))

    return Call(run, _sonic_leaves(inputs, w1_EFD), inputs.dy_TO)


PEERS = {
    "scattermoe": Variant(of_layer(scattermoe), "peer"),
    "liger": Variant(of_layer(liger), "peer"),
    "sonicmoe": Variant(_sonic, "peer", exact=_sonic_exact),
    "megablocks": Variant(of_layer(megablocks), "peer"),
    "unsloth": Variant(of_layer(unsloth), "peer"),
}
