# SPDX-License-Identifier: Apache-2.0
"""`python -m cumo_kernels.inspect --arch sm_90`: compile every kernel with every tile that is in use, without a GPU.

For the shapes of CuMo and some others, prints the registers, spilled bytes, shared memory and the number of tensor-core
and TMA instructions of each kernel. All of these are facts of the compiler; none of them is a time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from cumo_kernels.backend import interpreted
from cumo_kernels.ops.linear_topk_gating import MAX_EXPERTS
from cumo_kernels.tiling import GemmTile, Target, use_tiles
from cumo_kernels.tuned import Key

if TYPE_CHECKING:
    from cumo_kernels.kernels.compile import Facts, Source
    from cumo_kernels.kernels.launch import Launch

# The numbers of streaming multiprocessors bound grids only and never change what is compiled.
TARGETS = {
    "sm_80": Target.cuda(80, 108),
    "sm_86": Target.cuda(86, 84),
    "sm_89": Target.cuda(89, 142),
    "sm_90": Target.cuda(90, 132),
    "sm_100": Target.cuda(100, 148),
    "sm_103": Target.cuda(103, 148),
    "sm_120": Target.cuda(120, 170),
}
# The most shared memory of a block (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
SHARED_BYTES = {
    80: 163 << 10,
    86: 99 << 10,
    87: 163 << 10,
    89: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
    103: 227 << 10,
    110: 227 << 10,
    120: 99 << 10,
    121: 99 << 10,
}
# ptxas may spill a few bytes although there are registers left, to fit another block on a multiprocessor: no fault.
ALL_REGISTERS, TRADED_BYTES = 248, 16  # of 255, allocated eight at a time
# Matrix products: warp-group MMA, fifth-generation MMA, and else MMA of a warp.
TENSOR_CORES = {"sm_90": "HGMMA", "sm_100": "UTCMMA", "sm_103": "UTCMMA"}
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
    """The kernels of `launches_of`, each once."""
    from cumo_kernels.kernels.compile import source_of

    return list(dict.fromkeys(map(source_of, launches_of(case, target, dtype))))


def launches_of(case: Case, target: Target, dtype: torch.dtype) -> list[Launch]:
    """Everything that a router and a layer of `case` launch on `target`, forward and backward, in all dtypes of router,
    gate weights and expert ids that are usual beside experts in `dtype`."""
    from cumo_kernels.kernels.launch import record_launches

    with record_launches(dry_run_for=target) as launches:
        _walk_router(case, dtype)
        for weight_dtype in dict.fromkeys((torch.float32, dtype)):
            _walk_layer(case, dtype, weight_dtype)
            _walk_layer(case, dtype, weight_dtype, recompute=True, residual=True)
        _walk_parts(case, dtype)
    return launches


def layer_tiles(case: Case, target: Target, dtype: torch.dtype, backward: bool) -> dict[Key, GemmTile]:
    """The tiles in use on `target` for the GEMMs of a layer, by key."""
    from cumo_kernels.kernels.launch import record_launches

    with record_launches(dry_run_for=target), use_tiles({}) as asked:
        _walk_layer(case, dtype, dtype, backward=backward)
    return asked


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor that has a shape only: the launchers look at nothing else."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _walk_router(case: Case, dtype: torch.dtype) -> None:
    """Tokens and gate in the dtype of the experts, the gate alone in float32 as routers like it, or both in float32 as
    under autocast; probabilities rounded or not; ids as the gating makes them, or int64 as torch.topk does."""
    from cumo_kernels.kernels import dispatch, gating, linear_gating

    T, K, E, segment, float32 = case.T, case.K, case.E, case.segment or case.T, torch.float32
    for probs_dtype in dict.fromkeys((float32, dtype)):
        for x_dtype, gate_dtype in dict.fromkeys([(dtype, dtype), (dtype, float32), (float32, float32)]):
            if E <= MAX_EXPERTS:
                x, gate = _empty(T, case.D, dtype=x_dtype), _empty(E, case.D, dtype=gate_dtype)
                *_, logits = linear_gating.linear_gating_forward(x, gate, K, segment, True, probs_dtype)
                for need_x in (True, False):
                    linear_gating.linear_gating_backward(logits, x, gate, need_x, True)
        for logits_dtype in dict.fromkeys((float32, dtype)):
            logits = _empty(T, E, dtype=logits_dtype)
            weight, expert, balance, z, probs, share = gating.topk_gating_forward(logits, K, segment, True, probs_dtype)
            gating.topk_gating_backward(logits, expert, share, weight, balance, z, None, segment, True)
    logits, weight = logits.float(), weight.float()
    gating.topk_gating_backward(logits, expert, share, weight, balance, z, probs, segment, True)
    gating.topk_gating_backward(logits, expert, share, weight, None, None, None, segment, True)
    for ids_dtype in (torch.int32, torch.int64):
        dispatch.plan_dispatch(_empty(T, K, dtype=ids_dtype), E)


def _walk_layer(
    case: Case,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    *,
    recompute: bool = False,
    residual: bool = False,
    backward: bool = True,
) -> None:
    """The fused layer with all gradients; with `recompute` without that of its input, as behind a frozen model."""
    from cumo_kernels.kernels import dispatch, fused_mlp

    T, K, E, D, F, O = case.T, case.K, case.E, case.D, case.F, case.O
    F1 = 2 * F if case.gated else F
    empty = partial(_empty, dtype=dtype)
    b1, b2 = (empty(E, F1), empty(E, O)) if case.bias else (None, None)
    args = (empty(T, D), _empty(T, K, dtype=weight_dtype), empty(E, F1, D), empty(E, O, F), b1, b2)
    token, route, slot, offset = dispatch.plan_dispatch(_empty(T, K, dtype=torch.int32), E)
    y, z = fused_mlp.moe_mlp_forward(
        *args, empty(T, O) if residual else None, token, slot, offset, case.activation, case.gated, not recompute
    )
    if backward:
        need = [not recompute, True, True, True, b1 is not None, b2 is not None]
        fused_mlp.moe_mlp_backward(y, *args, z, token, route, slot, offset, case.activation, case.gated, need)


def _walk_parts(case: Case, dtype: torch.dtype) -> None:
    """What the operations launch by themselves and the fused layer does not."""
    from cumo_kernels.kernels import dispatch, grad_rows, grouped_gemm, permute

    T, K, E, D, F, O = case.T, case.K, case.E, case.D, case.F, case.O
    empty = partial(_empty, dtype=dtype)
    token, route, _, offset = dispatch.plan_dispatch(_empty(T, K, dtype=torch.int32), E)
    rows = permute.permute_forward(empty(T, D), token)
    permute.combine_backward(empty(T, O), empty(T * K, O), _empty(T, K, dtype=torch.float32), token, route)
    if not case.gated:
        h, z = grouped_gemm.grouped_gemm_forward(
            rows, empty(E, F, D), offset, T * K, bias_EN=empty(E, F) if case.bias else None,
            activation=case.activation, save_z=True, zero_tail=True,
        )  # fmt: skip
        assert h is not None
        grad_rows.activation_grad(h, z, offset, case.activation, case.bias)


def report(arch: str, dtype: str, workers: int) -> Iterator[tuple[Case, Source, Facts]]:
    """Compile all cases for `arch`; yields each kernel once, with the first case that launches it."""
    from cumo_kernels.kernels.compile import compile_source

    target = TARGETS[arch]
    seen: dict[Source, Case] = {}
    for case in CASES:
        for source in sources(case, target, DTYPES[dtype]):
            seen.setdefault(source, case)
    with ThreadPoolExecutor(workers) as pool:
        facts = pool.map(lambda source: compile_source(source, target.arch), seen)
        yield from zip(seen.values(), seen, facts, strict=True)


def operands(source: Source) -> tuple[str, ...]:
    """Dtypes of the two operands of a kernel's matrix product, as Triton names them; () if there is none."""
    if source.name.startswith("linear_gating"):
        names = ["dlogits_ptr" if source.name.endswith("backward") else "gate_ptr", "x_ptr"]
    elif source.has_dot:
        names = [source.signature[0][0]] * 2  # both have the same
    else:
        return ()
    types = dict(source.signature)
    return tuple(types[name].removeprefix("*").removeprefix("tensordesc<").split("[")[0] for name in names)


def on_cuda_cores(source: Source) -> bool:
    """Whether a product of float32 numbers is meant to be exact, which tensor cores cannot do: a router's with a gate
    in float32, or experts in float32."""
    return "fp32" in operands(source)


def faults(arch: str, source: Source, facts: Facts) -> list[str]:
    """What is wrong with a compiled kernel: spills, too much shared memory, no tensor cores or no TMA where they are
    due."""
    traded = facts.registers < ALL_REGISTERS and facts.spill_bytes <= TRADED_BYTES
    found = [f"{facts.spill_bytes} bytes spilled"] if facts.spill_bytes and not traded else []
    limit = SHARED_BYTES[TARGETS[arch].arch]
    if facts.shared_bytes > limit:
        found.append(f"{facts.shared_bytes >> 10} KB of shared memory, {arch} has {limit >> 10}")
    expected = TENSOR_CORES.get(arch, "HMMA")
    if expected == "UTCMMA" and source.name == "linear_gating":
        expected = "HMMA"  # its 32 rows do not fill the instruction, which has at least 64
    if operands(source) and not on_cuda_cores(source) and not facts.instructions[expected]:
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
    if on_cuda_cores(source):
        flags.append(f"{' x '.join(operands(source))} on CUDA cores")
    pointees = [kind[1:] for _, kind in source.signature if kind.startswith("*")]
    floats = [name for name, _ in groupby(name for name in pointees if name != "i32")]
    if len(floats) > 1:
        flags.append(",".join(floats))
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
    parser.add_argument("--fail-on-spill", action="store_true", help="exit with 1 if any kernel has a fault")
    options = parser.parse_args(arguments)
    if interpreted():
        parser.error("TRITON_INTERPRET is set: the kernels are interpreted, there is nothing to compile")
    failed, exact, traded = False, 0, 0
    for arch in options.arch:
        shown = None
        for case, source, facts in report(arch, options.dtype, options.workers):
            if case != shown:
                print(f"{arch} {options.dtype}: {case.name}")
                shown = case
            wrong = faults(arch, source, facts)
            exact += on_cuda_cores(source)
            traded += bool(facts.spill_bytes) and not any("spilled" in fault for fault in wrong)
            print(_row(source, facts) + (f"  <-- {', '.join(wrong)}" if wrong else ""), flush=True)
            failed |= bool(wrong)
    print("faults found" if failed else "no faults; tensor cores and TMA wherever they are due")
    print(f"by design: {exact} kernels multiply float32 on CUDA cores, as tensor cores would round it")
    if traded:
        print(f"by ptxas: {traded} kernels spill up to {TRADED_BYTES} bytes to fit another block on a multiprocessor")
    return int(failed and options.fail_on_spill)


if __name__ == "__main__":
    sys.exit(main())
