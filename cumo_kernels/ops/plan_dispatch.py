# SPDX-License-Identifier: Apache-2.0
"""The layout of tokens in expert-sorted rows."""

from __future__ import annotations

import torch
from torch import Tensor

from cumo_kernels import reference
from cumo_kernels.backend import backend_for
from cumo_kernels.checks import check_integer, check_num_experts, check_shapes
from cumo_kernels.types import DispatchPlan


@torch.library.custom_op("cumo_kernels::plan_dispatch", mutates_args=())
def _plan_dispatch(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from cumo_kernels.kernels.dispatch import plan_dispatch

    return plan_dispatch(expert_TK, num_experts)


@_plan_dispatch.register_fake
def _(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    T, K = expert_TK.shape
    sizes = (T * K,), (T * K,), (T, K), (num_experts + 1,)
    token_N, route_N, slot_TK, offset_E1 = (expert_TK.new_empty(size, dtype=torch.int32) for size in sizes)
    return token_N, route_N, slot_TK, offset_E1


def plan_dispatch(expert_TK: Tensor, num_experts: int) -> DispatchPlan:
    """Sort the N = T * K choices by expert (a stable counting sort), without waiting for the device.

    Choices whose id is outside 0..E-1, such as the sentinels of expert parallelism, are ignored: their rows come last,
    belong to no expert and add nothing to any sum.

    Args:
        expert_TK: [T, K] expert ids, int32 or int64.
        num_experts: E >= 1.

    Returns:
        `DispatchPlan`; see there for the fields.

    Raises:
        ValueError: an argument does not fit.

    Examples:
        >>> import torch, cumo_kernels as ck
        >>> plan = ck.plan_dispatch(torch.tensor([[2, 0], [2, 1], [0, 2]]), num_experts=3)
        >>> plan.offset_E1.diff().tolist()  # rows of each expert
        [2, 1, 3]
        >>> plan.token_N.tolist()  # within an expert, tokens keep their order
        [0, 2, 1, 0, 1, 2]
    """
    size = check_shapes(expert_TK=(expert_TK, "T K"))
    check_integer(expert_TK=expert_TK)
    num_experts = check_num_experts(num_experts)
    if size["K"] < 1:
        raise ValueError(f"expert_TK: expected at least one expert per token, got shape {list(expert_TK.shape)}")
    if backend_for(expert_TK) == "reference":
        return reference.plan_dispatch(expert_TK, num_experts)
    return DispatchPlan(*_plan_dispatch(expert_TK, num_experts))
