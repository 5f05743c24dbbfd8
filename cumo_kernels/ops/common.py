# SPDX-License-Identifier: Apache-2.0
"""What the operators share: dtypes under autocast, plans from a caller, and what the kernels do not differentiate."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cumo_kernels.backend import autocast_dtype
from cumo_kernels.checks import check_floating, check_same_dtype, check_shapes
from cumo_kernels.types import DispatchPlan


def autocast(**tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in one floating-point dtype: that of autocast if it is on for their device, else their own.

    As for `torch.nn.functional.linear`; float64 is left alone.

    Raises:
        ValueError: they have different dtypes outside of autocast, or some are float64 and others are not.
    """
    present = [t for t in tensors.values() if t is not None]
    dtype = autocast_dtype(present[0].device)
    if dtype is None or any(t.dtype == torch.float64 for t in present):
        check_same_dtype(**tensors)
        return tuple(tensors.values())
    check_floating(**tensors)
    return tuple(None if t is None else t.to(dtype) for t in tensors.values())


def check_residual(residual_TO: Tensor | None, output: Tensor, output_name: str) -> None:
    """`residual_TO` has the dtype of `output`, an argument that autocast may have cast."""
    if residual_TO is not None and residual_TO.dtype != output.dtype:
        origin = "of autocast" if autocast_dtype(output.device) == output.dtype else f"as {output_name}"
        raise ValueError(f"residual_TO: expected dtype {output.dtype} {origin}, got {residual_TO.dtype}")


def check_plan(plan: DispatchPlan, **arguments: tuple[Tensor | None, str]) -> DispatchPlan:
    """Check the shapes of the arguments as `check_shapes` does, and that `plan` fits them, the first one's device too.

    What the plan's tensors hold is not looked at: the host would have to wait. `DispatchPlan.validate` looks.

    Returns:
        The plan, contiguous as the kernels read it.

    Raises:
        ValueError: an argument does not fit.
    """
    if not isinstance(plan, DispatchPlan):
        raise ValueError(f"plan: expected a DispatchPlan, got {type(plan).__name__}")
    token_N, route_N, slot_TK, offset_E1 = plan
    fields = {
        "plan.token_N": (token_N, "N"),
        "plan.route_N": (route_N, "N"),
        "plan.slot_TK": (slot_TK, "T K"),
        "plan.offset_E1": (offset_E1, "E1"),
    }
    size = check_shapes(**arguments, **fields)
    first, (tensor, _) = next(iter(arguments.items()))
    assert tensor is not None
    device = tensor.device
    for name, (field, _) in fields.items():
        if field is None or field.dtype != torch.int32:
            raise ValueError(f"{name}: expected int32, got {None if field is None else field.dtype}")
        if field.device != device:
            raise ValueError(f"{name}: expected device {device} as {first}, got {field.device}")
    if size["K"] < 1 or size["T"] * size["K"] != size["N"]:
        raise ValueError(
            f"plan.slot_TK: expected shape [T K] with T * K = N={size['N']} as in plan.token_N, "
            f"got {list(slot_TK.shape)}"
        )
    if size["E1"] < 2:
        raise ValueError(f"plan.offset_E1: expected shape [E + 1] with E >= 1, got {list(offset_E1.shape)}")
    return DispatchPlan(token_N.contiguous(), route_N.contiguous(), slot_TK.contiguous(), offset_E1.contiguous())


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for a gradient of any of the tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def check_kernel_dtype(name: str, tensor: Tensor) -> None:
    """The kernels know float16, bfloat16 and float32."""
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(
            f"{name}: the triton backend expects float16, bfloat16 or float32, got {tensor.dtype}; "
            "use_backend('reference') computes in float64"
        )


def refuse_transforms(public_name: str, *tensors: Tensor | None) -> None:
    """Refuse what the kernels would leave out without a word, or PyTorch refuse without naming the operation:
    forward-mode differentiation, and `torch.func.grad` and what is made of it."""
    if forward_ad._current_level >= 0 and any(_has_tangent(t) for t in tensors if t is not None):
        raise RuntimeError(
            f"{public_name}: forward-mode differentiation is not implemented on the triton backend; "
            "use_backend('reference') differentiates in either mode"
        )
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is None:
        return
    functorch = torch._C._functorch
    kinds = [transform.key() for transform in functorch.get_interpreter_stack() or []]
    if functorch.TransformType.Grad not in kinds or not torch.is_grad_enabled():
        return
    if any(_is_tracked(t) for t in tensors if t is not None):
        raise RuntimeError(
            f"{public_name}: torch.func.grad and what is made of it (vjp, jacrev, hessian) are not implemented on the "
            "triton backend; Tensor.backward and torch.autograd.grad are, and use_backend('reference') has them all"
        )


def _is_tracked(tensor: Tensor) -> bool:
    # what is within a batch is not asked: it may be tracked
    return tensor.requires_grad or torch._C._functorch.is_batchedtensor(tensor)


def _has_tangent(tensor: Tensor) -> bool:
    if torch.compiler.is_compiling():  # what is traced has none, whatever is run will have
        return True
    return torch._C._functorch.is_batchedtensor(tensor) or forward_ad.unpack_dual(tensor).tangent is not None


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
