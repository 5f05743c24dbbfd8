# SPDX-License-Identifier: Apache-2.0
"""The same values in other memory: what callers hand over that is not one contiguous, aligned block."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor


def _padding(*shape: int, like: Tensor) -> Tensor:
    """NaN wherever nothing is written: a layout that is misread shows."""
    return torch.full(shape, math.nan, dtype=like.dtype, device=like.device)


def columns_of_a_wider_tensor(tensor: Tensor) -> Tensor:
    """Rows farther apart than they are long; the distance keeps 16-byte alignment where the width has it."""
    *outer, width = tensor.shape
    return _padding(*outer, width + 16, like=tensor)[..., :width].copy_(tensor)


def part_of_a_padded_tensor(tensor: Tensor) -> Tensor:
    """Every dimension is a slice of a longer one, at an offset that breaks 16-byte alignment."""
    padded = _padding(*(size + 3 for size in tensor.shape), like=tensor)
    return padded[tuple(slice(1, 1 + size) for size in tensor.shape)].copy_(tensor)


def transposed(tensor: Tensor) -> Tensor:
    """The last two dimensions lie in memory the other way round."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def every_other_element(tensor: Tensor) -> Tensor:
    """No dimension has stride 1."""
    doubled = _padding(*(2 * size for size in tensor.shape), like=tensor)
    return doubled[(slice(None, None, 2),) * tensor.dim()].copy_(tensor)


def one_row_for_all(tensor: Tensor) -> Tensor:
    """The first row in place of every row, at stride 0; other values, therefore."""
    return tensor[:1].expand_as(tensor)


def one_number_for_all(tensor: Tensor) -> Tensor:
    """Stride 0 in every dimension, as in the gradient that `.sum()` sends back; other values, therefore."""
    return tensor.new_full((), 0.75).expand_as(tensor)


Layout = Callable[[Tensor], Tensor]

VIEWS: tuple[Layout, ...] = (columns_of_a_wider_tensor, part_of_a_padded_tensor, transposed, every_other_element)
EXPANDED: tuple[Layout, ...] = (one_row_for_all, one_number_for_all)


def layouts(*kinds: Layout) -> pytest.MarkDecorator:
    """Parametrise `layout`."""
    return pytest.mark.parametrize("layout", kinds, ids=lambda layout: layout.__name__.replace("_", "-"))
