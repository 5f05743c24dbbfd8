# SPDX-License-Identifier: Apache-2.0
"""Every tile of every kernel: pure functions of the device, the dtype and the sizes. Nothing is tuned at run time:
a table that was tuned before (`cumo_kernels.tuned`) comes first, then what is chosen here.

Token counts enter in coarse steps (rows per expert: up to 16, 64, or more), so that a new batch size neither
recompiles nor retunes anything. Registers and spills of every choice are facts of the compiler:
`python -m cumo_kernels.inspect` prints them without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from cumo_kernels.checks import check_one_of
from cumo_kernels.tuned import Key, make_key, read_tables


@dataclass(frozen=True)
class Target:
    """What a device can do, as far as tiles depend on it."""

    arch: int
    """Compute capability, 90 for sm_90; 0 for Triton's CPU interpreter."""
    num_sms: int
    """Streaming multiprocessors: the grid of a persistent kernel."""
    has_tma: bool
    """Whether rows and weights go through the tensor memory accelerator (sm_90 and newer)."""

    @property
    def has_warp_group_products(self) -> bool:
        """Whether four warps share one large tensor-core product (sm_90 to sm_110); sm_120 has those of sm_80."""
        return 90 <= self.arch < 120

    @classmethod
    def cuda(cls, arch: int, num_sms: int) -> Target:
        """An NVIDIA GPU of compute capability `arch`."""
        return cls(arch=arch, num_sms=num_sms, has_tma=arch >= 90)


# Three programs: few enough that each does several tiles, and more than one, so that the stride matters.
INTERPRETER = Target(arch=0, num_sms=3, has_tma=False)


@dataclass(frozen=True)
class GemmTile:
    """Tile of a grouped GEMM. Field names in capitals are constexprs of the kernels."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    GROUP_M: int = 8
    SWAP: bool = False
    SLICES: int = 1
    programs_per_sm: int = 1

    def meta(self) -> dict[str, int]:
        """The arguments that all GEMM kernels take."""
        return {
            "BLOCK_M": self.BLOCK_M,
            "BLOCK_N": self.BLOCK_N,
            "BLOCK_K": self.BLOCK_K,
            "GROUP_M": self.GROUP_M,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


class _LaunchTile:
    """A dataclass whose fields are launch arguments, each under its own name."""

    def meta(self) -> dict[str, int]:
        """The launch arguments."""
        return dict(vars(self))


@dataclass(frozen=True)
class RowTile(_LaunchTile):
    """Tile of a kernel that moves rows."""

    BLOCK_N: int
    BLOCK_D: int
    num_warps: int


@dataclass(frozen=True)
class GatingTile:
    """Tile of the gating: tokens per block, and whether one program walks a whole segment."""

    BLOCK_T: int
    ONE_PROGRAM: bool
    num_warps: int


@dataclass(frozen=True)
class LinearGatingTile(_LaunchTile):
    """Tile of the gating with its linear layer: tokens and columns of x per step."""

    BLOCK_T: int
    BLOCK_D: int
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class LinearGatingBackwardTile(_LaunchTile):
    """Tile of the gradient of the router's linear layer: tokens per program and per step, columns."""

    CHUNK: int
    BLOCK_T: int
    BLOCK_D: int
    num_warps: int


@dataclass(frozen=True)
class DispatchTile:
    """Tile of the counting sort: choices per program, per step of ranking, per step of reading the counts."""

    CHUNK: int
    BLOCK: int
    SCAN: int
    COUNTED: bool


def _tile_of(fields: dict[str, Any]) -> GemmTile:
    try:
        return GemmTile(**fields)
    except TypeError as error:
        raise ValueError(f"tile: expected the fields of GemmTile, got {fields}") from error


_tuned: dict[Key, GemmTile] = {key: _tile_of(fields) for key, fields in read_tables().items()}
_asked_for: dict[Key, GemmTile] | None = None


@contextmanager
def use_tiles(tiles: dict[Key, GemmTile]) -> Iterator[dict[Key, GemmTile]]:
    """Within the block these tiles come before all others, in the whole process; yields a dict that collects every
    tile chosen in the block. For the tuner."""
    global _tuned, _asked_for
    previous = _tuned, _asked_for
    _tuned, _asked_for = {**_tuned, **tiles}, {}
    try:
        yield _asked_for
    finally:
        if previous[1] is not None:
            previous[1].update(_asked_for)
        _tuned, _asked_for = previous


GEMM_KINDS = ("forward", "gated", "dact", "dact_gated", "wgrad")


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n; 1 if n is less than that."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(n: int, d: int) -> int:
    """n / d, rounded up."""
    return -(-n // d)


def gemm_tile(
    target: Target,
    dtype: torch.dtype,
    rows: int,
    num_experts: int,
    n: int,
    kind: str,
    k: int,
    transposed: bool = False,
) -> GemmTile:
    """Tile of a grouped GEMM of `rows` rows over `num_experts` experts, output width n.

    `kind` says what the epilogue holds beside the accumulator: "forward" (nothing), "gated" (a second
    accumulator), "dact" and "dact_gated" (the backward through the activation); "wgrad" reduces over rows. `k`, the
    width that is summed over (of a "wgrad", the other width), and `transposed`, whether the weight is contiguous along
    n, matter to tuned tables only.
    """
    check_one_of("kind", kind, GEMM_KINDS)
    if not _tuned and _asked_for is None:
        return _chosen_tile(target, dtype, rows, num_experts, n, kind)
    key = make_key(target.arch, dtype, kind, rows, num_experts, n, k, transposed)
    tile = _tuned.get(key) or _chosen_tile(target, dtype, rows, num_experts, n, kind)
    if _asked_for is not None:
        _asked_for[key] = tile
    return tile


def _chosen_tile(target: Target, dtype: torch.dtype, rows: int, num_experts: int, n: int, kind: str) -> GemmTile:
    """Without a table."""
    if target.arch == 0:
        return GemmTile(32, 32, 32, num_warps=1, num_stages=1, GROUP_M=2, SLICES=2)
    if dtype == torch.float32:
        # fp32 products run on the CUDA cores: 64 x 64 fp32 accumulators are what 4 warps hold without spilling
        return GemmTile(64, 64, 32, num_warps=4, num_stages=2, SLICES=2)
    rows_per_expert = rows / num_experts
    if kind == "wgrad":
        return _wgrad_tile(target, n)
    if kind in ("forward", "gated") and rows_per_expert <= 16:
        return _decode_tile(target, kind)
    if rows_per_expert <= 64:
        narrow = kind in ("gated", "dact_gated") or not target.has_warp_group_products
        return GemmTile(64, 64 if narrow else 128, 64, num_warps=4, num_stages=3, SLICES=2 if narrow else 4)
    if not target.has_warp_group_products:
        narrow = kind in ("gated", "dact_gated")
        return GemmTile(128, 64 if narrow else 128, 32, num_warps=8, num_stages=4, SLICES=2)
    if kind == "forward" and n >= 256:
        return GemmTile(128, 256, 64, num_warps=8, num_stages=3, SLICES=4)
    # "dact" too: at 128 x 256 its epilogue spills on sm_90, in 4 slices 120 bytes a thread, in 8 still 16
    return GemmTile(128, 128, 64, num_warps=8, num_stages=3, SLICES=4)


def _wgrad_tile(target: Target, n: int) -> GemmTile:
    if not target.has_warp_group_products:
        return GemmTile(128, 128, 32, num_warps=8, num_stages=3)
    return GemmTile(128, 256 if n >= 256 else 128, 64, num_warps=8, num_stages=3)


def _decode_tile(target: Target, kind: str) -> GemmTile:
    """At most 16 rows per expert: the time is that of streaming the weights, so tiles are narrow in n (many
    programs), deep in k (long reads), and swapped, since tensor-core tiles of sm_90 have at least 64 rows."""
    block_k = 128 if kind == "forward" else 64
    return GemmTile(16, 64, block_k, num_warps=4, num_stages=4, SWAP=target.has_warp_group_products, programs_per_sm=2)


def use_sorted_copy(target: Target, rows: int) -> bool:
    """Whether to copy tokens into sorted rows before a GEMM, for TMA, rather than gather them on load.

    The copy costs a launch and 2 * rows * width * 2 bytes of traffic; below a few thousand rows a layer is bound by
    launches, above it others measured TMA at +12 to +18 % of a GEMM against pointer loads on an H100
    (sglang PR 36543).
    """
    return target.has_tma and rows >= 4096


def row_tile(width: int) -> RowTile:
    """Tile of a kernel that moves rows of `width` elements: about 4096 elements, 16 bytes per thread and load."""
    block_d = min(next_power_of_2(width), 512)
    return RowTile(BLOCK_N=max(1, min(4096 // block_d, 32)), BLOCK_D=block_d, num_warps=4)


def grad_row_tile(rows: int) -> RowTile:
    """Tile of a kernel that sums over the rows of an expert: of 64 rows, since every tile leaves a row of fp32 partial
    sums, a sixteenth of the bytes it read; of 16 while there are too few rows to occupy the device so."""
    return RowTile(BLOCK_N=64 if rows >= 8192 else 16, BLOCK_D=128, num_warps=4)


def gating_tile(segment: int, num_experts: int) -> GatingTile:
    """One program walks a segment of up to 16384 logits, four blocks one after the other, which saves the launch of a
    second kernel; more would leave the device idle. Blocks hold 4096 logits, 16 to a thread: with 32 the gradient
    spills."""
    e_pad = next_power_of_2(num_experts)
    logits = 4096 if e_pad < 256 else 2048  # the scatter of K gradients wants more registers
    block_t = max(1, min(logits // e_pad, next_power_of_2(max(segment, 1))))
    num_warps = 8 if block_t * e_pad >= 2048 else 4
    return GatingTile(BLOCK_T=block_t, ONE_PROGRAM=segment * e_pad <= 16384, num_warps=num_warps)


def linear_gating_tile(target: Target, num_experts: int) -> LinearGatingTile:
    """64 tokens, the rows of a warp-group product, by 128 columns: 16 KB of bf16, and three such steps in flight keep a
    memory-bound program busy. The selection among more than 16 experts wants the registers of eight warps."""
    # for sm_100 Triton 3.7.1 fails to compile a reduction over the accumulator of a 64-row product
    block_t = 32 if target.arch >= 100 else 64
    return LinearGatingTile(BLOCK_T=block_t, BLOCK_D=128, num_warps=4 if num_experts <= 16 else 8)


def linear_gating_backward_tile(tokens: int, num_experts: int) -> LinearGatingBackwardTile:
    """Chunks of many tokens where there are enough to occupy the device: every chunk writes E * D partial sums.

    Products have 32 rows. Larger ones spill, and for 64 rows on sm_100 Triton 3.7.1 uses TF32, whatever precision is
    asked for, if an operand was widened from 16 bits.
    """
    chunk, num_warps = 512 if tokens >= 8192 else 128, 4 if num_experts <= 32 else 8
    return LinearGatingBackwardTile(chunk, BLOCK_T=32, BLOCK_D=32, num_warps=num_warps)


def dispatch_tile(num_choices: int, num_experts: int) -> DispatchTile:
    """While N * E is at most 2**18, every program reads all ids, 16384 comparisons (64 to a thread) at a time: at most
    16 steps, quicker than the launch of a separate counting kernel. Programs then are small (256 choices), so that
    there are enough of them; with separate counts they are larger (1024), for each reads the counts of all.
    A ranking step compares BLOCK x BLOCK ids."""
    e_pad = next_power_of_2(num_experts)
    ids = max(16, 16384 // e_pad)
    if num_choices * e_pad <= 2**18:
        return DispatchTile(CHUNK=256, BLOCK=min(64, ids), SCAN=ids, COUNTED=False)
    return DispatchTile(CHUNK=1024, BLOCK=min(128, ids), SCAN=max(1, 8192 // e_pad), COUNTED=True)
