# SPDX-License-Identifier: Apache-2.0
"""How far two results may differ.

No test has a tolerance of its own: a result may be off by twice as much as eager PyTorch in the same dtype, both
measured against float64, plus one unit of the dtype, since eager may be exact by luck. Errors are relative to
the norm of the tensor, never absolute: an absolute bound passes anything where all values are small.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def relative_error(actual: Tensor, exact: Tensor, norm: float = 2) -> float:
    """||actual - exact|| / ||exact|| in float64; 0 if both are zero. NaN and infinity count only if one has them."""
    actual, exact = actual.detach().double().cpu(), exact.detach().double().cpu()
    same = (actual == exact) | (actual.isnan() & exact.isnan())
    difference = torch.where(same, 0.0, actual - exact)
    if not difference.isfinite().all():
        return math.inf
    if difference.count_nonzero() == 0:
        return 0.0
    size = float(torch.linalg.vector_norm(exact[exact.isfinite()], norm))
    return float(torch.linalg.vector_norm(difference, norm)) / size if size else math.inf


def worst_coordinate(actual: Tensor, exact: Tensor) -> str:
    """Where two tensors of one shape differ most, and both values there."""
    actual, exact = actual.detach().double().cpu(), exact.detach().double().cpu()
    same = (actual == exact) | (actual.isnan() & exact.isnan())
    distance = torch.where(same, 0.0, (actual - exact).abs().nan_to_num(nan=math.inf))
    if distance.numel() == 0:
        return "no elements"
    at = tuple(int(i) for i in torch.unravel_index(distance.argmax(), distance.shape))
    return f"worst at {at}: got {float(actual[at]):.9g}, expected {float(exact[at]):.9g}"


def _fault(actual: Tensor, eager: Tensor, exact: Tensor, rounded_to: torch.dtype | None) -> str | None:
    """Why `actual` does not pass, or None."""
    if actual.shape != exact.shape or actual.dtype != eager.dtype:
        return f"got {actual.dtype} {list(actual.shape)}, expected {eager.dtype} {list(exact.shape)}"
    if not actual.is_floating_point():
        return None if torch.equal(actual, eager) else worst_coordinate(actual, eager)
    eps = max(torch.finfo(dtype).eps for dtype in (actual.dtype, rounded_to or actual.dtype))
    # The 2-norm sees errors that all elements share, the maximum a single wrong element among many. The latter, and
    # either norm of a few elements, is more a matter of luck, for both sides.
    for norm, units in ((2, 1 if actual.numel() >= 16 else 3), (math.inf, 3)):
        error, eager_error = relative_error(actual, exact, norm), relative_error(eager, exact, norm)
        if not error <= 2 * eager_error + units * eps:
            bound = f"2 * {eager_error:.2e} (eager) + {units} * {eps:.2e}"
            return f"error {error:.2e} > {bound} in the {norm}-norm; {worst_coordinate(actual, exact)}"
    return None


def assert_as_exact_as_eager(
    actual: Mapping[str, Tensor],
    eager: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    names: Iterable[str] | None = None,
    rounded_to: torch.dtype | None = None,
) -> None:
    """Each named tensor (all, by default) is at most twice as far from `exact`, in float64, as `eager` is, plus one
    unit of its dtype, or of the coarser `rounded_to` where a step on the way rounds to that; integers are equal.
    The largest error may be three units more than twice eager's.

    Raises:
        AssertionError: naming each tensor that fails, its worst coordinate and both values there.
    """
    names = list(exact) if names is None else list(names)
    assert names, "nothing to compare"
    assert actual.keys() == eager.keys() == exact.keys()
    faults = {name: _fault(actual[name], eager[name], exact[name], rounded_to) for name in names}
    assert not any(faults.values()), "\n".join(f"{name}: {fault}" for name, fault in faults.items() if fault)


def assert_bitwise_equal(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Every tensor has the same bits in both; NaN equals NaN.

    Raises:
        AssertionError: naming each tensor that differs, its worst coordinate and both values there.
    """
    assert actual.keys() == expected.keys()
    assert actual, "nothing to compare"
    faults = []
    for name, a in actual.items():
        b = expected[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            faults.append(f"{name}: got {a.dtype} {list(a.shape)}, expected {b.dtype} {list(b.shape)}")
        elif not bool(((a == b) | ((a != a) & (b != b))).all()):
            faults.append(f"{name}: {worst_coordinate(a, b)}")
    assert not faults, "\n".join(faults)
