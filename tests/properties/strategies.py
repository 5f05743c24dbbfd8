# SPDX-License-Identifier: Apache-2.0
"""What a caller may hand to an operation: sizes, routings, layouts in memory, tiles.

Hypothesis draws the structure, which it can shrink, and one seed for the numbers, which it need not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

import cumo_kernels as ck
from cumo_kernels import tiling
from cumo_kernels.backend import interpreted
from cumo_kernels.kernels import launch
from cumo_kernels.tiling import (
    DispatchTile,
    GatingTile,
    GemmTile,
    LinearGatingBackwardTile,
    LinearGatingTile,
    RowTile,
    Target,
)
from tests.cumo_kernels.layouts import EXPANDED, VIEWS, Layout
from tests.poison import poisoned, untouched

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SEEDS = st.integers(0, 2**32 - 1)
TOKENS = st.sampled_from([0, 1, 2, 3]) | st.integers(0, 16) | st.integers(0, 40)
POSITIVE_WIDTHS = st.sampled_from([1, 16, 32]) | st.integers(1, 40)
WIDTHS = st.sampled_from([0, 1, 16, 32]) | st.integers(1, 40)
ACTIVATIONS = st.sampled_from(list(ck.ACTIVATIONS))
AUTOCAST = st.sampled_from([None, None, torch.bfloat16, torch.float16])


def examples(few: int) -> settings:
    """`few` examples within the suite, which derandomizes them; otherwise as many as the profile has."""
    return settings(max_examples=few) if settings().derandomize else settings()


@st.composite
def layouts(draw: st.DrawFn, *names: str, of_gradients: bool = False) -> dict[str, Layout]:
    """How some of these tensors, often none, lie in memory."""
    kinds = st.sampled_from(VIEWS + EXPANDED if of_gradients else VIEWS)
    return {name: draw(kinds) for name in names if draw(st.integers(0, 2)) == 2}


@st.composite
def normals(draw: st.DrawFn, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Normally distributed numbers."""
    generator = torch.Generator().manual_seed(draw(SEEDS))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


@st.composite
def exact_numbers(draw: st.DrawFn, *shape: int, dtype: torch.dtype) -> Tensor:
    """Multiples of 1/2 from -1 to 1: sums of up to 64 products of two of them are exact in every dtype, so that equal
    logits are equal however they are summed."""
    generator = torch.Generator().manual_seed(draw(SEEDS))
    return (torch.randint(-2, 3, shape, generator=generator) / 2).to(dtype)


def subsets(names: list[str]) -> st.SearchStrategy[list[str]]:
    """All names, most often, or some of them, at least one."""
    some = st.lists(st.sampled_from(names), min_size=1, unique=True) if names else st.just([])
    return st.just(names) | some


@st.composite
def expert_ids(draw: st.DrawFn, T: int, K: int, E: int) -> Tensor:
    """[T, K] ids, int32 or int64: distinct, repeated within a token, all the same, of few experts, out of range."""
    generator = torch.Generator().manual_seed(draw(SEEDS))
    kind = draw(st.sampled_from(["distinct", "repeated", "one", "some out of range", "all out of range"]))
    if kind == "distinct" and K <= E:
        ids = torch.rand(T, E, generator=generator).argsort(dim=1)[:, :K]
    elif kind == "one":
        ids = torch.full((T, K), draw(st.integers(0, E - 1)))
    elif kind == "all out of range":
        ids = torch.full((T, K), draw(st.sampled_from([-1, E, 2**31 - 1, -(2**31)])))
    else:
        margin = 0 if kind in ("distinct", "repeated") else 2
        ids = torch.randint(-margin, E + margin, (T, K), generator=generator)
    ids = ids.to(draw(st.sampled_from([torch.int32, torch.int64])))
    memory = draw(st.sampled_from(["contiguous", "transposed", "every other"]))
    if memory == "transposed":
        return ids.T.contiguous().T
    return torch.stack([ids, ids + 99], dim=-1)[..., 0] if memory == "every other" else ids


@st.composite
def segments(draw: st.DrawFn, T: int) -> int | None:
    """None, or a divisor of T; of no tokens, any number."""
    return draw(st.none() | st.sampled_from([s for s in range(1, max(T, 7) + 1) if T % s == 0]))


@st.composite
def gate_weights(draw: st.DrawFn, T: int, K: int, dtype: torch.dtype) -> Tensor:
    """[T, K] weights: positive, some zero, all zero, or of either sign."""
    generator = torch.Generator().manual_seed(draw(SEEDS))
    weight_TK = torch.rand(T, K, generator=generator) + 0.1
    kind = draw(st.sampled_from(["positive", "some zero", "all zero", "of either sign"]))
    if kind == "some zero":
        weight_TK = weight_TK * (torch.rand(T, K, generator=generator) < 0.5)
    elif kind == "all zero":
        weight_TK = weight_TK * 0
    elif kind == "of either sign":
        weight_TK = weight_TK * (torch.randint(0, 2, (T, K), generator=generator) * 2 - 1)
    return weight_TK.to(dtype)


@st.composite
def gemm_tiles(draw: st.DrawFn) -> Callable[..., GemmTile]:
    """A choice of tiles by kind of GEMM, as small as the kernels take them, so that few rows are several tiles."""
    sides = st.sampled_from([16, 32])
    made = {}
    for kind in tiling.GEMM_KINDS:
        m, n, k = draw(sides), draw(sides), draw(sides)
        swap = kind in ("forward", "gated") and draw(st.booleans())
        group, slices = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4]))
        made[kind] = GemmTile(m, n, k, num_warps=1, num_stages=1, GROUP_M=group, SWAP=swap, SLICES=slices)
    return lambda *args: made[args[5]]


@st.composite
def tilings(draw: st.DrawFn) -> dict[str, Callable[..., object]]:
    """Functions of `cumo_kernels.tiling` to put in place of its own; most often none, so that those run too."""
    if draw(st.booleans()):
        return {}
    gating = GatingTile(draw(st.sampled_from([1, 4, 16])), draw(st.booleans()), num_warps=4)
    linear = LinearGatingTile(BLOCK_T=16, BLOCK_D=16)
    linear_backward = LinearGatingBackwardTile(CHUNK=32, BLOCK_T=16, BLOCK_D=16, num_warps=4)
    rows = RowTile(draw(st.sampled_from([4, 8])), 16, num_warps=4)
    grad_rows = RowTile(16, draw(st.sampled_from([8, 32])), num_warps=4)
    dispatch = DispatchTile(CHUNK=8, BLOCK=4, SCAN=draw(st.sampled_from([2, 4])), COUNTED=draw(st.booleans()))
    sorted_copy, gemm = draw(st.booleans()), draw(gemm_tiles())
    return {
        "gemm_tile": gemm,
        "gating_tile": lambda *_: gating,
        "linear_gating_tile": lambda *_: linear,
        "linear_gating_backward_tile": lambda *_: linear_backward,
        "row_tile": lambda *_: rows,
        "grad_row_tile": lambda *_: grad_rows,
        "dispatch_tile": lambda *_: dispatch,
        "use_sorted_copy": lambda *_: sorted_copy,
    }


@st.composite
def machines(draw: st.DrawFn) -> Target:
    """What the interpreter pretends to be: few or many processors, with TMA or without."""
    return Target(arch=0, num_sms=draw(st.sampled_from([1, 3, 7])), has_tma=draw(st.booleans()))


@contextmanager
def running_on(machine: Target, tiles: dict[str, Callable[..., object]]) -> Iterator[None]:
    """Launch with these tiles and as on that machine (in the interpreter), on poisoned memory between guards."""
    guards: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        if interpreted():
            patch.setattr(launch, "INTERPRETER", machine)
            for name, function in tiles.items():
                patch.setattr(tiling, name, function)
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, poisoned(getattr(owner, name), guards))
        yield
    assert untouched(guards), "something wrote past an end of its memory"
