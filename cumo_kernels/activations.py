# SPDX-License-Identifier: Apache-2.0
"""Activations in eager PyTorch, by name; `kernels/epilogues.py` holds the Triton twin of each.

Examples:
    >>> import torch, cumo_kernels as ck
    >>> list(ck.ACTIVATIONS)
    ['gelu', 'gelu_tanh', 'quick_gelu', 'silu', 'relu', 'relu2']
    >>> ck.ACTIVATIONS["relu2"](torch.tensor([-1.0, 3.0])).tolist()
    [0.0, 9.0]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x): the approximation of GELU that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)**2 (Primer, arXiv 2109.08668)."""
    return F.relu(x).square()


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation (arXiv 1606.08415)."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "silu": F.silu,
    "relu": F.relu,
    "relu2": relu2,
}
"""By name, elementwise functions in eager PyTorch, from a tensor to one of the same shape and dtype."""
