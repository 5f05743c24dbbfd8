# SPDX-License-Identifier: Apache-2.0
"""Judges an operation on both backends, with its gradients, by the loops in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

import cumo_kernels as ck
from cumo_kernels import reference
from tests.cumo_kernels.harness import Tensors, differentiate, in_float64, outputs_of, surrounded
from tests.cumo_kernels.layouts import Layout, transposed
from tests.numerics import assert_as_exact_as_eager, relative_error
from tests.properties import loops


def cotangents_of(name: str, tensors: Tensors, seed: int, **constants: Any) -> dict[str, Tensor]:
    """A random gradient for each floating-point output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        outputs = outputs_of(getattr(reference, name)(**tensors, **constants))
    floating = {n: t for n, t in outputs.items() if t.is_floating_point()}
    return {n: torch.randn(t.shape, generator=generator).to(t) for n, t in floating.items()}


def laid_out(tensors: Tensors, layouts: Mapping[str, Layout]) -> dict[str, Tensor | None]:
    """Each tensor in its layout, if it has one; of vectors, those that a vector can have."""
    return {
        n: layouts[n](t) if n in layouts and t is not None and (t.dim() > 1 or layouts[n] is not transposed) else t
        for n, t in tensors.items()
    }


def cast(tensors: Tensors, dtype: torch.dtype | None, leave: Iterable[str] = ()) -> dict[str, Tensor | None]:
    """As autocast would have it; the values in memory as they were."""
    left = set(leave)
    return {
        n: t.to(dtype) if t is not None and dtype is not None and t.is_floating_point() and n not in left else t
        for n, t in tensors.items()
    }


def clumsy(tensors: Tensors, unit: float, decide: Iterable[str] = (), seed: int = 0) -> dict[str, Tensor | None]:
    """The same values in float64, each off by up to half a unit. Those of the tensors that `decide` are all off alike,
    by a unit of float32, in which routers compute: that leaves their order as it is."""
    alike, generator = set(decide), torch.Generator().manual_seed(seed)

    def off(name: str, tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point():
            return tensor
        if name in alike:
            return tensor * (1 + torch.finfo(torch.float32).eps)
        noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 0.5
        return tensor * (1 + unit * noise.to(tensor))

    return {name: off(name, tensor) for name, tensor in in_float64(tensors).items()}


def farther(one: Tensor, other: Tensor, exact: Tensor) -> Tensor:
    """Whichever is farther from the exact result, in the dtype of the first; integers are those of the first."""
    if not one.is_floating_point():
        return one
    other = other.to(one.dtype)
    return other if relative_error(one, exact) < relative_error(other, exact) < math.inf else one


def assert_correct(
    name: str,
    tensors: Tensors,
    *,
    wrt: Iterable[str],
    cotangents: Mapping[str, Tensor],
    rounded_to: torch.dtype,
    autocast: torch.dtype | None = None,
    never_cast: Iterable[str] = (),
    decide: Iterable[str] = (),
    public: Callable[..., Any] | None = None,
    loop: Callable[..., Any] | None = None,
    **constants: Any,
) -> None:
    """The reference is as exact as the loop in the same dtype, and the kernels are as exact as the reference, both
    against the loop in float64. `tensors` are those that the caller of `name`, or of `public`, holds, also under
    autocast; the loop gets them cast.

    When a result hangs on few numbers, eager mode can be exact by chance. So an error is also allowed that arguments
    off by up to half a unit cause, the largest of three draws: no computation can be blamed for it.
    The arguments that `decide` which experts are chosen are off in a way that changes no choice.
    """
    wrt = list(wrt)
    narrow = cast(tensors, autocast, never_cast)
    public, loop = public or getattr(ck, name), loop or getattr(loops, name)
    device_type = next(t for t in tensors.values() if t is not None).device.type
    exact = differentiate(loop, in_float64(narrow), wrt, in_float64(cotangents), **constants)

    def in_public(**arguments: Any) -> Any:
        with torch.autocast(device_type, autocast, enabled=autocast is not None):
            return public(**arguments)

    def in_the_dtypes_of_the_caller(results: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: t.to(tensors[n[1:]].dtype) if n[1:] in wrt else t for n, t in results.items()}

    eager = in_the_dtypes_of_the_caller(differentiate(loop, narrow, wrt, cotangents, **constants))
    unit = torch.finfo(rounded_to).eps
    for seed in range(3):
        arguments = clumsy(narrow, unit, decide, seed)
        blurred = differentiate(loop, arguments, wrt, clumsy(cotangents, unit, seed=seed), **constants)
        eager = {n: farther(t, blurred[n], exact[n]) for n, t in eager.items()}
    with ck.use_backend("reference"):
        by_reference = differentiate(in_public, tensors, wrt, cotangents, **constants)
    assert_as_exact_as_eager(by_reference, eager, exact, rounded_to=rounded_to)
    with ck.use_backend("triton"):
        by_kernels = differentiate(in_public, surrounded(tensors), wrt, cotangents, **constants)
    by_reference = {n: farther(t, eager[n], exact[n]) for n, t in by_reference.items()}
    assert_as_exact_as_eager(by_kernels, by_reference, exact, rounded_to=rounded_to)
