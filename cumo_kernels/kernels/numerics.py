# SPDX-License-Identifier: Apache-2.0
"""Products and roundings that mean the same on a GPU and in Triton's CPU interpreter."""

from __future__ import annotations

import triton
import triton.language as tl

from cumo_kernels.backend import interpreted

_INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def dot(x, w, acc, PRECISION: tl.constexpr):
    """acc + x w in fp32. The interpreter would multiply bf16 operands as the integers that hold their bits."""
    if _INTERPRETED:
        return tl.dot(x.to(tl.float32), w.to(tl.float32), acc, input_precision=PRECISION)
    else:
        return tl.dot(x, w, acc, input_precision=PRECISION)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """fp32 `x` rounded to `dtype`, to nearest even, and kept in fp32. By hand for bf16: the interpreter truncates."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    else:
        return x.to(dtype).to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 `x` in `dtype`, rounded to nearest even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        return round_to(x, dtype).to(dtype)
    else:
        return x.to(dtype)
