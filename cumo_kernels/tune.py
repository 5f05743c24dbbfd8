# SPDX-License-Identifier: Apache-2.0
"""`python -m cumo_kernels.tune`: search the tiles of the GEMMs for given layers, on the card at hand.

From the tile that is in use, one field at a time is changed, and what is faster is kept, until nothing is or the time
is up. A candidate's output and gradients have to equal those of the tiles in use before it counts. Writes a table for
CUMO_TUNED_TILES (see `cumo_kernels.tuned`), sorted, with card, versions and gain beside each tile. Nothing in this
package tunes by itself.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cumo_kernels import inspect, tiling
from cumo_kernels.backend import interpreted, use_backend
from cumo_kernels.inspect import CASES, Case
from cumo_kernels.ops.moe_mlp import moe_mlp
from cumo_kernels.tiling import GemmTile, Target
from cumo_kernels.tuned import Key, key_of, read_entries

# What each field may become. Sides from what one warp group multiplies up to what its registers hold.
CHOICES: dict[str, tuple[int, ...]] = {
    "BLOCK_M": (64, 128, 256),
    "BLOCK_N": (64, 128, 256),
    "BLOCK_K": (32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4, 5),
    "GROUP_M": (1, 4, 8, 16),
    "SLICES": (1, 2, 4, 8),
    "programs_per_sm": (1, 2),
}
# Shared memory of a block, as the CUDA programming guide has it; 0 is the interpreter, which has no limit.
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 0: 227 << 10}
DECODE_TOKENS = 64  # up to so many, a layer serves inference: its forward alone is timed
RUNS = 20
LEAST_GAIN = 0.01  # below, a difference is noise
# Tiles differ in the order of sums only, by a few roundings.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

Timer = Callable[[Callable[[], object]], float]


def is_legal(tile: GemmTile, key: Key) -> bool:
    """Whether a kernel could be made of a tile: the buffers of all stages fit in shared memory, slices have at least
    the 16 columns of a matrix product, and accumulators leave registers for what else is needed."""
    operands = tile.BLOCK_M + tile.BLOCK_N * (2 if key.kind == "gated" else 1)
    buffers = operands * tile.BLOCK_K * (4 if key.dtype == "float32" else 2) * tile.num_stages
    accumulators = tile.BLOCK_M * tile.BLOCK_N * (2 if key.kind in ("gated", "dact_gated") else 1)
    return (
        buffers * tile.programs_per_sm <= SHARED_BYTES[key.arch]
        and tile.BLOCK_N // tile.SLICES >= 16
        and accumulators <= 128 * 32 * tile.num_warps  # 128 of 255 registers of each thread
    )


def neighbours(tile: GemmTile, key: Key) -> Iterator[GemmTile]:
    """Legal tiles that differ in one field; a decode tile (swapped, of 16 rows) stays one."""
    for name, choices in CHOICES.items():
        if name == "BLOCK_M" and tile.SWAP:
            continue
        for value in choices:
            changed = replace(tile, **{name: value})  # type: ignore[arg-type]
            if changed != tile and is_legal(changed, key):
                yield changed


class Layer:
    """A case with random inputs, to be run and timed."""

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            tensor = torch.randn(shape, generator=generator, device=device) * scale
            return tensor.to(dtype).requires_grad_()

        up = case.F * (2 if case.gated else 1)
        self.case, self.backward = case, case.T > DECODE_TOKENS
        scores_TE = torch.rand(case.T, case.E, generator=generator, device=device)
        self.expert_TK = scores_TE.topk(case.K, dim=1).indices.int()
        self.leaves = [
            normal(case.T, case.D),
            torch.rand(case.T, case.K, generator=generator, device=device).to(dtype).requires_grad_(),
            normal(case.E, up, case.D, scale=case.D**-0.5),
            normal(case.E, case.O, case.F, scale=case.F**-0.5),
            *([normal(case.E, up), normal(case.E, case.O)] if case.bias else []),
        ]
        self.dy_TO = normal(case.T, case.O).detach()

    def run(self) -> list[Tensor]:
        """Output, and the gradients where the layer is one for training."""
        x, weight, w1, w2, *biases = self.leaves
        b1, b2 = biases or (None, None)
        case = self.case
        with torch.set_grad_enabled(self.backward), use_backend("triton"):
            y = moe_mlp(x, weight, self.expert_TK, w1, w2, b1, b2, activation=case.activation, gated=case.gated)
        if not self.backward:
            return [y]
        return [y.detach(), *torch.autograd.grad(y, self.leaves, self.dy_TO)]


def agrees(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether all tensors are equal up to rounding."""
    for a, e in zip(actual, expected, strict=True):
        error = (a.double() - e.double()).norm() / e.double().norm().clamp_min(1e-30)
        if not error.item() <= TOLERANCE[e.dtype]:  # NaN is not
            return False
    return True


def median_ms(run: Callable[[], object]) -> float:
    """Milliseconds of a run on a GPU, by events."""
    for _ in range(3):
        run()
    samples = []
    for _ in range(RUNS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        samples.append(begin.elapsed_time(end))
    return statistics.median(samples)


class Search:
    """Finds the tiles of one layer.

    Args:
        layer: to be run.
        timer: milliseconds of a function.
        deadline: of `clock`; nothing new is tried after it.
        log: gets a line for each candidate.
    """

    def __init__(
        self, layer: Layer, timer: Timer, deadline: float, log: Callable[[str], None], clock: Callable[[], float]
    ) -> None:
        self.layer, self.timer, self.deadline, self.log, self.clock = layer, timer, deadline, log, clock
        self.found: dict[Key, GemmTile] = {}
        with tiling.use_tiles({}) as asked:
            self.expected = layer.run()
            self.first_ms = self.best_ms = timer(layer.run)
        self.keys = dict(asked)

    def run(self) -> dict[Key, GemmTile]:
        """What is faster than what is in use, by key."""
        improved = True
        while improved:
            improved = False
            for key in self.keys:
                improved |= self._improve(key)
        self._confirm()
        return self.found

    def _confirm(self) -> None:
        """Time both ends once more, one after the other: cards drift. What is no gain then is given up."""
        if not self.found:
            return
        self.first_ms = self.timer(self.layer.run)
        with tiling.use_tiles(self.found):
            self.best_ms = self.timer(self.layer.run)
        if self.best_ms > (1 - LEAST_GAIN) * self.first_ms:
            self.log(f"{self.best_ms:.3f} ms is no gain over {self.first_ms:.3f} ms, timed once more")
            self.found, self.best_ms = {}, self.first_ms

    def _improve(self, key: Key) -> bool:
        """Try every neighbour of a key's tile once, from the best one so far."""
        improved = False
        for tile in list(neighbours(self.found.get(key, self.keys[key]), key)):
            if self.clock() >= self.deadline:
                return False
            ms = self._try(key, tile)
            if ms is not None and ms < (1 - LEAST_GAIN) * self.best_ms:
                self.found[key], self.best_ms, improved = tile, ms, True
        return improved

    def _try(self, key: Key, tile: GemmTile) -> float | None:
        """Time of the layer with one more tile changed; None if it is wrong, or cannot be compiled or launched."""
        told = f"{key.kind} n={key.n} {tile}"
        with tiling.use_tiles({**self.found, key: tile}):
            try:
                if not agrees(self.layer.run(), self.expected):
                    self.log(f"wrong   {told}")
                    return None
                ms = self.timer(self.layer.run)
            except Exception as error:  # noqa: BLE001  out of resources, or a compiler that gives up: not a candidate
                self.log(f"failed  {told}: {type(error).__name__}")
                return None
        self.log(f"{ms:7.3f} {told}")
        return ms


def _entries(search: Search, case: Case, device: torch.device) -> list[dict[str, Any]]:
    """What the table says of each tile found."""
    import triton

    return [
        {
            **key._asdict(),
            "tile": asdict(tile),
            "gain_of_layer": round(search.first_ms / search.best_ms, 4),
            "layer": case.name,
            "pass": "both" if search.layer.backward else "forward",
            "card": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "torch": torch.__version__,
            "triton": triton.__version__,
        }
        for key, tile in search.found.items()
    ]


def write_table(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Add entries to a table, in place of those of the same keys; sorted.

    Raises:
        ValueError: the file is there and is no table.
    """
    merged = {key_of(entry): entry for entry in [*(read_entries(path) if path.is_file() else []), *entries]}
    aside = path.with_name(path.name + ".incomplete")
    aside.write_text(json.dumps([merged[key] for key in sorted(merged)], indent=1) + "\n")
    aside.replace(path)


def compile_candidates(case: Case, arch: str, dtype: str) -> Iterator[tuple[Key, GemmTile, int, int]]:
    """Without a GPU: every neighbour of the tiles in use, with the registers and spilled bytes of its kernels."""
    from cumo_kernels.kernels.compile import compile_source

    target: Target = inspect.TARGETS[arch]
    with tiling.use_tiles({}) as asked:
        usual = set(inspect.sources(case, target, inspect.DTYPES[dtype]))
    for key, tile in dict(asked).items():
        for changed in neighbours(tile, key):
            with tiling.use_tiles({key: changed}):
                new = [s for s in inspect.sources(case, target, inspect.DTYPES[dtype]) if s not in usual]
            facts = [compile_source(source, target.arch) for source in new]
            if facts:
                yield key, changed, max(fact.registers for fact in facts), max(fact.spill_bytes for fact in facts)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m cumo_kernels.tune", description=__doc__.split("\n")[0])
    names = [case.name for case in CASES]
    parser.add_argument("--layers", nargs="+", choices=names, default=names[:4], help="default: %(default)s")
    parser.add_argument("--dtype", choices=inspect.DTYPES, default="bf16")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds for each layer; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("tuned_tiles.json"), help="default: %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="compile the candidates, which needs no GPU, and report")
    parser.add_argument("--arch", choices=inspect.TARGETS, default="sm_90", help="of --dry-run")
    return parser.parse_args(arguments)


def _dry_run(options: argparse.Namespace) -> int:
    deadline = time.monotonic() + options.budget
    for case in (case for case in CASES if case.name in options.layers):
        print(case.name)
        for key, tile, registers, spilled in compile_candidates(case, options.arch, options.dtype):
            print(f"  {registers:>4} reg {spilled:>5} B spilled  {key.kind} n={key.n} {tile}", flush=True)
            if time.monotonic() > deadline:
                print("  the time is up")
                break
        deadline = time.monotonic() + options.budget
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    options = parse(arguments)
    if interpreted():
        print("error: TRITON_INTERPRET is set: the kernels are interpreted, there is nothing to tune", file=sys.stderr)
        return 2
    if options.dry_run:
        return _dry_run(options)
    if not torch.cuda.is_available():
        print("error: expected a GPU to time on, found none; --dry-run compiles without one", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    for case in (case for case in CASES if case.name in options.layers):
        print(case.name, flush=True)
        layer = Layer(case, inspect.DTYPES[options.dtype], device)
        search = Search(layer, median_ms, time.monotonic() + options.budget, print, time.monotonic)
        search.run()
        gain = search.first_ms / search.best_ms
        print(f"{case.name}: {search.first_ms:.3f} ms -> {search.best_ms:.3f} ms, {gain:.3f} x")
        write_table(options.out, _entries(search, case, device))
        print(f"{options.out}: {len(search.found)} tiles; CUMO_TUNED_TILES={options.out} uses them", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
