# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments: every failure is a `ValueError` that names the argument, what came and what was expected."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_shapes(**arguments: tuple[Tensor | None, str]) -> dict[str, int]:
    """Bind the letters of each pattern to sizes; `None` tensors are passed over.

    `check_shapes(x_TD=(x, "T D"), weight_TK=(w, "T K"))` returns `{"T": ..., "D": ..., "K": ...}`.
    """
    size: dict[str, int] = {}
    origin: dict[str, str] = {}
    for name, (tensor, pattern) in arguments.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name}: expected a tensor of shape [{pattern}], got {type(tensor).__name__}")
        letters = pattern.split()
        if tensor.dim() != len(letters):
            raise ValueError(f"{name}: expected shape [{pattern}], got {list(tensor.shape)}")
        for letter, actual in zip(letters, tensor.shape, strict=True):
            if letter not in size:
                size[letter], origin[letter] = actual, name
            elif size[letter] != actual:
                raise ValueError(
                    f"{name}: expected shape [{pattern}] with {letter}={size[letter]} as in {origin[letter]}, "
                    f"got {list(tensor.shape)}"
                )
    return size


def check_same_device(**tensors: Tensor | None) -> None:
    """All tensors lie on the device of the first."""
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, *others = present
    for name in others:
        if present[name].device != present[first].device:
            raise ValueError(f"{name}: expected device {present[first].device} as {first}, got {present[name].device}")


def check_same_dtype(**tensors: Tensor | None) -> None:
    """All tensors have the floating-point dtype of the first."""
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, *others = present
    check_floating(**{first: present[first]})
    for name in others:
        if present[name].dtype != present[first].dtype:
            raise ValueError(f"{name}: expected dtype {present[first].dtype} as {first}, got {present[name].dtype}")


def check_floating(**tensors: Tensor | None) -> None:
    """Each tensor is float16, bfloat16, float32 or float64."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{name}: expected a floating-point dtype, got {tensor.dtype}")


def check_integer(**tensors: Tensor) -> None:
    """Each tensor is int32 or int64."""
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name}: expected int32 or int64, got {tensor.dtype}")


def check_one_of(name: str, value: object, allowed: Iterable[object]) -> None:
    """`value` is one of `allowed`."""
    allowed = list(allowed)
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {allowed}, got {value!r}")


def is_count(value: object) -> bool:
    """Whether `value` is a positive integer; a symbolic size of torch.compile is one, a bool is not."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool) and value >= 1


def check_num_experts(num_experts: int) -> None:
    """num_experts >= 1."""
    if not is_count(num_experts):
        raise ValueError(f"num_experts: expected a positive integer, got {num_experts!r}")


def check_top_k(top_k: int, num_experts: int) -> None:
    """1 <= top_k <= num_experts."""
    if not is_count(top_k) or top_k > num_experts:
        raise ValueError(f"top_k: expected an integer in 1..{num_experts} (the number of experts), got {top_k!r}")


def check_segment(segment: int | None, num_tokens: int) -> int:
    """Tokens per segment: `num_tokens` if `segment` is None, else a divisor of it."""
    if segment is None:
        return num_tokens
    if not is_count(segment) or num_tokens % segment:
        raise ValueError(f"segment: expected a divisor of the {num_tokens} tokens, got {segment!r}")
    return segment
