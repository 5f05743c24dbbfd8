# SPDX-License-Identifier: Apache-2.0
"""Fused Mixture-of-Experts layers for PyTorch, in Triton.

The layer is five operations and their fusion, all differentiable, each with a reference of the same signature in
`cumo_kernels.reference`.

Examples:
    >>> import torch, cumo_kernels as ck
    >>> x_TD, gate_ED = torch.randn(10, 8), torch.randn(4, 8)
    >>> w1_EFD, w2_EOF = torch.randn(4, 16, 8), torch.randn(4, 6, 16)
    >>> routing = ck.topk_gating(x_TD @ gate_ED.T, top_k=2)
    >>> ck.moe_mlp(x_TD, routing.weight_TK, routing.expert_TK, w1_EFD, w2_EOF).shape
    torch.Size([10, 6])
"""

from cumo_kernels.activations import ACTIVATIONS
from cumo_kernels.backend import use_backend
from cumo_kernels.ops.combine import combine
from cumo_kernels.ops.grouped_gemm import grouped_gemm
from cumo_kernels.ops.linear_topk_gating import linear_topk_gating
from cumo_kernels.ops.moe_mlp import moe_mlp
from cumo_kernels.ops.permute import permute
from cumo_kernels.ops.plan_dispatch import plan_dispatch
from cumo_kernels.ops.topk_gating import topk_gating
from cumo_kernels.types import DispatchPlan, Routing

__all__ = [
    "ACTIVATIONS",
    "DispatchPlan",
    "Routing",
    "combine",
    "grouped_gemm",
    "linear_topk_gating",
    "moe_mlp",
    "permute",
    "plan_dispatch",
    "topk_gating",
    "use_backend",
]
