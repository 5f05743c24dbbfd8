# SPDX-License-Identifier: Apache-2.0
"""Memory that shows what was read before it was written, and what was written beside it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

GUARD = 64  # elements on either side; a multiple of 16 bytes, so that alignment stays what it was
MAX_GUARDED = 2**22  # elements; larger tensors are poisoned only, to keep tests of large sizes within memory


def poison_value(dtype: torch.dtype) -> float | int | bool:
    """What a forgotten element holds: NaN, the most negative integer, or True."""
    if dtype.is_floating_point or dtype.is_complex:
        return math.nan
    return True if dtype == torch.bool else torch.iinfo(dtype).min


def poisoned(allocate: Callable[..., Tensor], guards: list[Tensor]) -> Callable[..., Tensor]:
    """`allocate`, with its result full of poison and in the middle of a larger storage full of poison, whose two ends
    are added to `guards`."""

    def allocate_poisoned(*args: object, **kwargs: object) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if type(tensor) is not Tensor or tensor.is_meta or tensor.is_sparse or tensor.numel() == 0:
            return tensor
        poison = poison_value(tensor.dtype)
        if tensor.numel() > MAX_GUARDED:
            return tensor.fill_(poison)
        storage = torch.full((tensor.numel() + 2 * GUARD,), poison, dtype=tensor.dtype, device=tensor.device)
        guards.extend((storage[:GUARD], storage[-GUARD:]))
        # not a view: the caller may return it from an autograd function or hand it to a custom operator
        inner = torch.tensor((), dtype=tensor.dtype, device=tensor.device)
        inner.set_(storage.untyped_storage(), GUARD, tensor.shape, tensor.stride())
        return inner.requires_grad_(tensor.requires_grad)

    return allocate_poisoned


def untouched(guards: list[Tensor]) -> bool:
    """Whether every guard still holds nothing but poison."""
    return all(
        bool((guard.isnan() if guard.is_floating_point() else guard == poison_value(guard.dtype)).all())
        for guard in guards
    )
