# SPDX-License-Identifier: Apache-2.0
"""What the operators share: autocast, and the refusal of second derivatives."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in the autocast dtype of the first one's device, if autocast is on there; else as they are.

    As for `torch.nn.functional.linear`; float64 is left alone.
    """
    assert tensors[0] is not None
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def check_kernel_dtype(name: str, tensor: Tensor) -> None:
    """The kernels know float16, bfloat16 and float32."""
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(
            f"{name}: the triton backend expects float16, bfloat16 or float32, got {tensor.dtype}; "
            "use_backend('reference') computes in float64"
        )


def refuse_double_backward(operator: Any, public_name: str) -> None:
    """Register an autograd formula for the backward operator `operator` that says what is not there."""

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(
            f"{public_name}: double backward is not implemented on the triton backend; "
            "use_backend('reference') differentiates any number of times"
        )

    operator.register_autograd(backward, setup_context=setup_context)


def or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    """`tensor`, or an empty placeholder: custom operators return tensors, not None."""
    return like.new_empty(0) if tensor is None else tensor


def or_none(tensor: Tensor, wanted: bool) -> Tensor | None:
    """Undo `or_empty`."""
    return tensor if wanted else None
