# SPDX-License-Identifier: Apache-2.0
"""What happens to an accumulator tile on its way out: activations with their derivatives, and column slices.

`activation` and `activation_and_derivative` are selected at compile time by the names in
`cumo_kernels.activations.ACTIVATIONS`, which holds the eager twin of each.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sigmoid_and_derivative(x):
    """(s, s (1 - s)), each to a few units of itself: 1 - s of a rounded s would be off by a unit of 1, which the
    derivatives below multiply by up to the cube of x."""
    e = tl.exp2(-1.4426950408889634 * tl.abs(x))  # log2(e): exp(-|x|)
    r = 1.0 / (1.0 + e)
    return tl.where(x < 0, e * r, r), e * r * r


@triton.jit
def activation_and_derivative(x, NAME: tl.constexpr):
    """(f(x), f'(x)) in fp32. What is not used is dropped by the compiler."""
    if NAME == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))  # 1 / sqrt(2)
        density = 0.3989422804014327 * tl.exp2(-0.7213475204444817 * x * x)  # exp(-x^2 / 2) / sqrt(2 pi)
        return x * cdf, cdf + x * density
    elif NAME == "gelu_tanh":
        u = 1.5957691216057308 * (x + 0.044715 * x * x * x)  # 2 sqrt(2 / pi): (1 + tanh(u / 2)) / 2 = sigmoid(u)
        s, ds = _sigmoid_and_derivative(u)
        return x * s, s + x * ds * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif NAME == "quick_gelu":
        s, ds = _sigmoid_and_derivative(1.702 * x)
        return x * s, s + 1.702 * x * ds
    elif NAME == "silu":
        s, ds = _sigmoid_and_derivative(x)
        return x * s, s + x * ds
    elif NAME == "relu":
        # x != x: NaN stays NaN
        return tl.where((x > 0) | (x != x), x, 0.0), tl.where(x > 0, 1.0, 0.0)
    elif NAME == "relu2":
        r = tl.where((x > 0) | (x != x), x, 0.0)
        return r * r, 2.0 * r
    else:
        tl.static_assert(False, "activation without a kernel")


@triton.jit
def activation(x, NAME: tl.constexpr):
    """f(x) in fp32; the identity if NAME is None."""
    if NAME is None:
        return x
    else:
        value, _ = activation_and_derivative(x, NAME)
        return value


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Left and right half of `tile` [ROWS, COLUMNS]."""
    return tile.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()


@triton.jit
def column_slices(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SLICES: tl.constexpr):
    """`tile` [ROWS, COLUMNS] as a tuple of SLICES (1, 2, 4 or 8) tiles of neighbouring columns.

    An epilogue that touches further tiles as large as the accumulator does not fit in registers: compiled whole
    for sm_90 at 128 x 256, the one of `grouped_dact` spills more than 2000 bytes a thread.
    """
    if SLICES == 1:
        return (tile,)
    else:
        left, right = _halves(tile, ROWS, COLUMNS)
        left = column_slices(left, ROWS, COLUMNS // 2, SLICES // 2)
        right = column_slices(right, ROWS, COLUMNS // 2, SLICES // 2)
        return left + right
