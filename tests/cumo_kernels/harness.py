# SPDX-License-Identifier: Apache-2.0
"""Runs an operation of `cumo_kernels` on either backend, with all its gradients by name, and compares the two."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import cumo_kernels as ck
from cumo_kernels import reference
from tests.numerics import assert_as_exact_as_eager

Tensors = Mapping[str, Tensor | None]

FP32_AND_BF16 = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
EVERY_DTYPE = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
PLAIN_AND_GATED = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])


def outputs_of(result: Any) -> dict[str, Tensor]:
    """The tensors that an operation returned, by name."""
    return result._asdict() if isinstance(result, tuple) else {"out": result}


def differentiable(tensors: Tensors) -> list[str]:
    """Names of the tensors that can have a gradient."""
    return [name for name, tensor in tensors.items() if tensor is not None and tensor.is_floating_point()]


def differentiate(
    op: Callable[..., Any], tensors: Tensors, wrt: Iterable[str], cotangents: Mapping[str, Tensor], **constants: Any
) -> dict[str, Tensor]:
    """The outputs of `op(**tensors, **constants)`, and under "d" + name the gradient of each tensor in `wrt`."""
    wrt = list(wrt)
    # detached, not copied: strides and the memory around a tensor are part of the test
    inputs = {name: t if t is None else t.detach().requires_grad_(name in wrt) for name, t in tensors.items()}
    outputs = outputs_of(op(**inputs, **constants))
    results = {name: output.detach() for name, output in outputs.items()}
    flowing = [name for name, output in outputs.items() if output.requires_grad and name in cotangents]
    if wrt:
        grads = torch.autograd.grad(
            [outputs[name] for name in flowing],
            [inputs[name] for name in wrt],
            [cotangents[name] for name in flowing],
        )
        results |= {f"d{name}": grad for name, grad in zip(wrt, grads, strict=True)}
    return results


def in_float64(tensors: Tensors) -> dict[str, Tensor | None]:
    """The same values in float64; integers are left alone."""
    return {n: t.double() if t is not None and t.is_floating_point() else t for n, t in tensors.items()}


def surrounded(tensors: Tensors) -> dict[str, Tensor | None]:
    """Contiguous tensors copied to fresh, hence guarded memory: what lies beyond an end is then NaN, not zero."""
    return {
        name: torch.empty_like(t).copy_(t) if t is not None and t.is_contiguous() else t for name, t in tensors.items()
    }


def run(
    name: str, tensors: Tensors, cotangents: Mapping[str, Tensor], wrt: Iterable[str] | None = None, **constants: Any
) -> dict[str, Tensor]:
    """The public operation `name` on the triton backend, and its gradients."""
    with ck.use_backend("triton"):
        return differentiate(
            getattr(ck, name), tensors, differentiable(tensors) if wrt is None else wrt, cotangents, **constants
        )


def random_cotangents(name: str, tensors: Tensors, **constants: Any) -> dict[str, Tensor]:
    """A random gradient for each floating-point output: with ones, a gradient that is summed over the wrong
    dimension or left unmultiplied would pass."""
    with torch.no_grad():
        outputs = outputs_of(getattr(reference, name)(**tensors, **constants))
    return {n: torch.randn_like(t) for n, t in outputs.items() if t.is_floating_point()}


def assert_agrees(
    name: str,
    tensors: Tensors,
    *,
    wrt: Iterable[str] | None = None,
    cotangents: Mapping[str, Tensor] | None = None,
    op: Callable[..., Any] | None = None,
    rounded_to: torch.dtype | None = None,
    **constants: Any,
) -> dict[str, Tensor]:
    """The triton backend's `name` (or `op`), with every gradient (or those of `wrt`), is as exact as the reference.

    Returns what the triton backend computed.
    """
    computed_in = tensors[differentiable(tensors)[0]].dtype  # the first argument's; gate weights may be wider
    wrt = differentiable(tensors) if wrt is None else list(wrt)
    cotangents = random_cotangents(name, tensors, **constants) if cotangents is None else cotangents
    judge = getattr(reference, name)
    exact = differentiate(judge, in_float64(tensors), wrt, in_float64(cotangents), **constants)
    eager = differentiate(judge, tensors, wrt, cotangents, **constants)
    with ck.use_backend("triton"):
        actual = differentiate(op or getattr(ck, name), surrounded(tensors), wrt, cotangents, **constants)
    assert_as_exact_as_eager(actual, eager, exact, rounded_to=rounded_to or computed_in)
    return actual


def random_plan(T: int, K: int, E: int, device: torch.device, ignored: int = 0) -> ck.DispatchPlan:
    """The plan of random choices, of which those of the last `ignored` of E + `ignored` experts are ignored."""
    return reference.plan_dispatch(random_experts(T, K, E + ignored, device), E)


def random_experts(T: int, K: int, E: int, device: torch.device, avoid: int | None = None) -> Tensor:
    """K different experts for each token, int32, none of them `avoid`."""
    score_TE = torch.rand(T, E, device=device)
    if avoid is not None:
        score_TE[:, avoid] = 2.0
    return score_TE.argsort(dim=1)[:, :K].int()


def make_layer(
    device: torch.device,
    T: int = 6,
    K: int = 2,
    E: int = 3,
    D: int = 20,
    F: int = 36,
    O: int = 17,
    *,
    gated: bool = False,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype = torch.float32,
    expert_TK: Tensor | None = None,
) -> dict[str, Tensor | None]:
    """Random arguments of `moe_mlp` by name. The default widths differ, and none is a multiple of a tile."""

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    F1 = 2 * F if gated else F
    return {
        "x_TD": random(T, D),
        "weight_TK": torch.rand(T, K, device=device).add(0.1).to(weight_dtype),
        "expert_TK": random_experts(T, K, E, device) if expert_TK is None else expert_TK,
        "w1_EFD": random(E, F1, D, scale=max(D, 1) ** -0.5),
        "w2_EOF": random(E, O, F, scale=max(F, 1) ** -0.5),
        "b1_EF": random(E, F1),
        "b2_EO": random(E, O),
    }
