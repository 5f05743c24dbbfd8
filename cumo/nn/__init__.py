# SPDX-License-Identifier: Apache-2.0
"""Modules over the operations of `cumo_kernels`, for any PyTorch model.

Examples:
    >>> import torch
    >>> from cumo.nn import MoEMLP
    >>> y, routing = MoEMLP(8, 16, num_experts=4, top_k=2)(torch.randn(3, 5, 8))
    >>> y.shape, routing.balance_S.shape  # three images of five tokens
    (torch.Size([3, 5, 8]), torch.Size([3]))
"""

from cumo.nn.moe import MoEMLP, expert_load
from cumo.nn.upcycled import Upcycled, upcycle
from cumo.nn.upcycling import upcycle_mlp

__all__ = ["MoEMLP", "Upcycled", "expert_load", "upcycle", "upcycle_mlp"]
