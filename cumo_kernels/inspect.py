# SPDX-License-Identifier: Apache-2.0
"""`python -m cumo_kernels.inspect --arch sm_90`: compile every kernel at every tile it ships, without a GPU.

Prints registers, spilled bytes, shared memory and the number of tensor-core and TMA instructions of each, for the
shapes of CuMo and some others. What stands here are facts of the compiler; none of them is a time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from cumo_kernels.backend import interpreted
from cumo_kernels.ops.linear_topk_gating import MAX_EXPERTS
from cumo_kernels.tiling import Target

if TYPE_CHECKING:
    from cumo_kernels.kernels.compile import Facts, Source

# Streaming multiprocessors: they bound grids and so never change what is compiled.
TARGETS = {"sm_80": Target.cuda(80, 108), "sm_90": Target.cuda(90, 132), "sm_100": Target.cuda(100, 148)}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Case(NamedTuple):
    """A layer whose launches are compiled; letters as in `cumo_kernels.types`."""

    name: str
    T: int
    K: int
    E: int
    D: int
    F: int
    O: int
    activation: str
    gated: bool
    bias: bool
    segment: int | None


CASES = (
    Case("CLIP-MoE, both scales, 4 images", 40 * 577, 2, 4, 1024, 4096, 1024, "quick_gelu", False, True, 577),
    Case("CLIP-MoE, small scale, 1 image", 577, 2, 4, 1024, 4096, 1024, "quick_gelu", False, True, 577),
    Case("connector, 4 images", 4 * 576, 2, 4, 2048, 4096, 4096, "gelu", False, True, 576),
    Case("Mixtral, 4096 tokens", 4096, 2, 8, 4096, 14336, 4096, "silu", True, False, None),
    Case("Mixtral, 64 tokens", 64, 2, 8, 4096, 14336, 4096, "silu", True, False, None),
    Case("Mixtral, 8 tokens", 8, 2, 8, 4096, 14336, 4096, "silu", True, False, None),
    Case("128 fine-grained experts", 32768, 8, 128, 2048, 768, 2048, "silu", True, False, None),
    Case("64 experts of Mixtral's width", 512, 6, 64, 4096, 2048, 4096, "silu", True, False, None),
    Case("256 experts of DeepSeek-V3's width", 8192, 8, 256, 7168, 2048, 7168, "silu", True, False, None),
    Case("connector, 8 tokens", 8, 2, 4, 2048, 4096, 4096, "gelu", False, True, None),
)


def sources(case: Case, target: Target, dtype: torch.dtype) -> list[Source]:
    """Everything the layer of `case` launches on `target`, forward and backward, each distinct kernel once."""
    from cumo_kernels.kernels.compile import source_of
    from cumo_kernels.kernels.launch import record_launches

    with record_launches(dry_run_for=target) as launches:
        _walk(case, dtype)
    return list(dict.fromkeys(map(source_of, launches)))


def _walk(case: Case, dtype: torch.dtype) -> None:
    """Call every launcher with tensors that have shapes only."""
    from cumo_kernels.kernels import dispatch, fused_mlp, gating, grad_rows, grouped_gemm, linear_gating, permute

    T, K, E, D, F, O = case.T, case.K, case.E, case.D, case.F, case.O
    F1 = 2 * F if case.gated else F

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, dy, w1, w2 = empty(T, D), empty(T, O), empty(E, F1, D), empty(E, O, F)
    b1, b2 = (empty(E, F1), empty(E, O)) if case.bias else (None, None)
    logits, segment = empty(T, E, dtype=torch.float32), case.segment or T
    weight, expert, balance, z, probs, share = gating.topk_gating_forward(logits, K, segment, True, torch.float32)
    if E <= MAX_EXPERTS:
        linear_gating.linear_gating_forward(x, empty(E, D), K, segment, True, torch.float32)
    gating.topk_gating_backward(logits, expert, share, weight, balance, z, probs, segment, True)
    token, route, slot, offset = dispatch.plan_dispatch(expert, E)
    for need_x in (True, False):
        z_NF = empty(T * K, F1) if need_x else None  # the second time as with recompute=True and frozen inputs
        args = (x, weight, w1, w2, b1, b2)
        fused_mlp.moe_mlp_forward(*args, dy, token, slot, offset, case.activation, case.gated, need_x)
        need = [need_x, True, True, True, b1 is not None, b2 is not None]
        fused_mlp.moe_mlp_backward(dy, *args, z_NF, token, route, slot, offset, case.activation, case.gated, need)
    rows = permute.permute_forward(x, token)
    permute.combine_backward(dy, empty(T * K, O), weight, token, route)
    if not case.gated:
        h, z_saved = grouped_gemm.grouped_gemm_forward(
            rows, w1, offset, T * K, bias_EN=b1, activation=case.activation, save_z=True, zero_tail=True
        )
        assert h is not None
        grad_rows.activation_grad(h, z_saved, offset, case.activation, case.bias)


def report(arch: str, dtype: str, workers: int) -> Iterator[tuple[Case, Source, Facts]]:
    """Compile all cases for `arch`; yields what is new in each, in order."""
    from cumo_kernels.kernels.compile import compile_source

    target = TARGETS[arch]
    seen: dict[Source, Case] = {}
    for case in CASES:
        for source in sources(case, target, DTYPES[dtype]):
            seen.setdefault(source, case)
    with ThreadPoolExecutor(workers) as pool:
        facts = pool.map(lambda source: compile_source(source, target.arch), seen)
        yield from zip(seen.values(), seen, facts, strict=True)


def faults(arch: str, dtype: str, source: Source, facts: Facts) -> list[str]:
    """What is wrong with a compiled kernel: spills, a matrix product off the tensor cores, a descriptor without TMA."""
    found = [f"{facts.spill_bytes} bytes spilled"] if facts.spill_bytes else []
    expected = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCMMA"}[arch]
    # 16-row tiles do not fill the instructions of sm_100, which have at least 64 rows
    if source.has_dot and dtype != "fp32" and not facts.instructions[expected]:
        found.append(f"no {expected}")
    if any(kind.startswith("tensordesc") for _, kind in source.signature) and not facts.instructions["TMA"]:
        found.append("descriptors without TMA")
    return found


def _row(source: Source, facts: Facts) -> str:
    blocks = [source.constant(name) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")]
    if blocks[2] is None:
        names = ("BLOCK_T", "BLOCK_N", "BLOCK_D", "BLOCK")
        blocks = [value for value in map(source.constant, names) if value is not None]
    options = dict(source.options)
    counts = " ".join(f"{name} {count}" for name, count in facts.instructions.items() if count)
    flags = [name for name in ("GATED", "GATHER", "SWAP", "X_TMA", "W_TMA", "G_TMA") if source.constant(name)]
    tile = "x".join(map(str, blocks))
    return (
        f"  {source.name:22} {tile:>11} {options['num_warps']:>2}w {options.get('num_stages', '-'):>1}s "
        f"{source.constant('ACTIVATION') or '':10} {facts.registers:>4} reg {facts.spill_bytes:>5} B spilled "
        f"{facts.shared_bytes / 1024:>6.1f} KB  {counts:24} {' '.join(flags)}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns 1 if something is wrong and `--fail-on-spill` was given."""
    parser = argparse.ArgumentParser(prog="python -m cumo_kernels.inspect", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=["sm_90"], help="architectures to compile for")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--workers", type=int, default=2, help="kernels compiled at a time")
    parser.add_argument(
        "--fail-on-spill", action="store_true", help="exit with 1 on spills, or where tensor cores or TMA stay unused"
    )
    options = parser.parse_args(arguments)
    if interpreted():
        parser.error("TRITON_INTERPRET is set: the kernels are interpreted, there is nothing to compile")
    failed = False
    for arch in options.arch:
        shown = None
        for case, source, facts in report(arch, options.dtype, options.workers):
            if case != shown:
                print(f"{arch} {options.dtype}: {case.name}")
                shown = case
            wrong = faults(arch, options.dtype, source, facts)
            print(_row(source, facts) + (f"  <-- {', '.join(wrong)}" if wrong else ""), flush=True)
            failed |= bool(wrong)
    print("faults found" if failed else "no spills; tensor cores and TMA wherever they are due")
    return int(failed and options.fail_on_spill)


if __name__ == "__main__":
    sys.exit(main())
