# SPDX-License-Identifier: Apache-2.0
"""The one door through which kernels are launched, so that launches can be counted, listed or only compiled."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cumo_kernels.backend import interpreted
from cumo_kernels.tiling import INTERPRETER, Target

# Triton's interpreter keeps the grid and the program it is at in globals, and replaces functions of triton.language
# while a kernel runs: threads take turns, and no process is forked in the middle of a kernel.
_turn: AbstractContextManager[Any] = nullcontext()
if interpreted():
    _turn = _lock = threading.RLock()
    os.register_at_fork(before=_lock.acquire, after_in_child=_lock.release, after_in_parent=_lock.release)


class Launch(NamedTuple):
    """One kernel launch: what `kernel[grid](*args, **meta)` receives."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]


class _Recording(NamedTuple):
    launches: list[Launch]
    target: Target | None  # not None: pretend to run on this target, launch nothing


_recording: _Recording | None = None


@contextmanager
def record_launches(dry_run_for: Target | None = None) -> Iterator[list[Launch]]:
    """Collect every launch of this block into a list.

    With `dry_run_for`, tiles are chosen for that target and nothing is launched, so that the launchers can be
    walked through with tensors on the device "meta". Of the whole process, not of a thread: autograd runs
    backward passes on threads of its own.
    """
    global _recording
    previous, _recording = _recording, _Recording([], dry_run_for)
    try:
        yield _recording.launches
    finally:
        _recording = previous


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Run `kernel[grid](*args, **meta)`; a grid with a zero in it is nothing to do.

    Triton announces another default for `enable_fp_fusion`; contraction to fused multiply-add is wanted here.
    Threads may launch at the same time; in Triton's interpreter, which cannot, one waits for the other.
    """
    if 0 in grid:
        return
    meta = {"enable_fp_fusion": True, **meta}
    if _recording is not None:
        _recording.launches.append(Launch(kernel, grid, args, meta))
        if _recording.target is not None:
            return
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    # Triton launches on the current device, which need not be that of the tensors
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), _turn:
        kernel[grid](*args, **meta)


@functools.cache
def _device_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    return Target.cuda(properties.major * 10 + properties.minor, properties.multi_processor_count)


def target_of(tensor: Tensor) -> Target:
    """What the tensor's device can do: the input of every tile choice."""
    if _recording is not None and _recording.target is not None:
        return _recording.target
    if tensor.device.type == "cuda":
        return _device_target(tensor.device.index)
    return INTERPRETER


def can_use_tma(tensor: Tensor) -> bool:
    """Whether a tensor-memory-accelerator descriptor can address `tensor`: unit inner stride, 16-byte rows and base."""
    size = tensor.element_size()
    aligned = all(stride > 0 and stride * size % 16 == 0 for stride in tensor.stride()[:-1])
    return tensor.numel() > 0 and tensor.stride(-1) == 1 and aligned and tensor.data_ptr() % 16 == 0


def descriptor(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """A tensor-memory-accelerator descriptor of `tensor` that moves tiles of shape `block`."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)
