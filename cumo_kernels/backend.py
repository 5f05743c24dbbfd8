# SPDX-License-Identifier: Apache-2.0
"""The one place where the backend of an operation is chosen, from facts: the device, and what the user forced.

"triton" runs the kernels (on a GPU, or on a CPU in Triton's interpreter when `TRITON_INTERPRET=1`);
"reference" runs `cumo_kernels.reference` in eager PyTorch on any device. The default is "triton" for CUDA
tensors and "reference" elsewhere; the environment variable `CUMO_BACKEND` and `use_backend` force one.
Nothing falls back: a backend that cannot run raises, whether forced or the default. On the meta device, where nothing
runs, either backend gives shapes and dtypes.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from cumo_kernels.checks import check_one_of

BACKENDS = ("triton", "reference")

# A plain global: torch.compile guards its value, but neither that of a context variable nor of a thread's local.
_forced: str | None = os.environ.get("CUMO_BACKEND") or None
_HAS_TRITON = importlib.util.find_spec("triton") is not None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force the backend "triton" or "reference" for the calls in this block, in every thread of the process.

    The backward of an operation runs on the backend of its forward. Each block restores the backend that it found, so
    blocks nest; blocks of two threads that overlap without nesting would leave one thread's backend behind.

    Args:
        name: "triton" or "reference". Whether it can run is only checked by the first operation.

    Raises:
        ValueError: `name` is neither.

    Examples:
        >>> import torch, cumo_kernels as ck
        >>> with ck.use_backend("reference"):  # the oracle, in eager PyTorch and in float64 too
        ...     weight_TK = ck.topk_gating(torch.zeros(2, 4, dtype=torch.float64), top_k=2).weight_TK
        >>> weight_TK.tolist(), weight_TK.dtype
        ([[0.5, 0.5], [0.5, 0.5]], torch.float64)
    """
    check_one_of("backend", name, BACKENDS)
    global _forced
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's CPU interpreter (`TRITON_INTERPRET` when they are imported)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def backend_for(tensor: Tensor) -> str:
    """The backend for an operation on `tensor`.

    Raises:
        RuntimeError: the backend is "triton", and Triton is missing or cannot run on the tensor's device.
        ValueError: `CUMO_BACKEND` names no backend.
    """
    device_type = tensor.device.type
    is_cuda = device_type == "cuda"
    name = _forced
    if name is None:
        name = "triton" if is_cuda else "reference"
    check_one_of("CUMO_BACKEND", name, BACKENDS)
    if name == "triton":
        if not _HAS_TRITON:
            raise RuntimeError(
                "backend 'triton': Triton is not installed; install it, or set CUMO_BACKEND=reference for the slow path"
            )
        if not is_cuda and device_type != "meta" and not interpreted():
            raise RuntimeError(
                f"backend 'triton': got tensors on {tensor.device}, expected a CUDA device; "
                "on a CPU the kernels run only in Triton's interpreter (TRITON_INTERPRET=1)"
            )
    return name


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast on `device`; None if it is off, or unknown there as on the meta device."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A block in which autocast is off on `device`."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
