# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments: every failure is a `ValueError` that names the argument, what came and what was expected."""

from __future__ import annotations

import operator
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


def as_count(value: object) -> int | None:
    """`value` as a positive integer, or None if it is none: NumPy's integers are, a bool and a tensor are not.

    A symbolic size of torch.compile is one, and stays symbolic.
    """
    if not isinstance(value, (int, torch.SymInt)):
        # the index of a tensor is data, and to torch.compile that of a NumPy integer too
        if isinstance(value, Tensor) or torch.compiler.is_compiling():
            return None
        if str(getattr(value, "dtype", "")) == "bool":  # NumPy before 2.3 gives its booleans an index
            return None
        try:
            value = operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            return None
    return value if not isinstance(value, bool) and value >= 1 else None  # type: ignore[return-value]


def check_count(name: str, value: object) -> int:
    """The argument `name` as an int, at least 1."""
    count = as_count(value)
    if count is None:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    return count


def check_num_experts(num_experts: int) -> int:
    """`num_experts` as an int, at least 1."""
    return check_count("num_experts", num_experts)


def check_top_k(top_k: int, num_experts: int) -> int:
    """`top_k` as an int in 1..num_experts."""
    count = as_count(top_k)
    if count is None or count > num_experts:
        raise ValueError(f"top_k: expected an integer in 1..{num_experts} (the number of experts), got {top_k!r}")
    return count


def check_segment(segment: int | None, num_tokens: int) -> int:
    """Tokens per segment: `num_tokens` if `segment` is None, else a divisor of it."""
    if segment is None:
        return num_tokens
    count = as_count(segment)
    if count is None or num_tokens % count:
        raise ValueError(f"segment: expected a divisor of the {num_tokens} tokens, got {segment!r}")
    return count
