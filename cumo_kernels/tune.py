# SPDX-License-Identifier: Apache-2.0
"""`python -m cumo_kernels.tune`: search for faster tiles of the GEMMs of given layers, on the card at hand.

The search starts from the tiles in use and changes one field at a time. It keeps a change that makes the layers faster,
and ends when no change does or the time is up. A candidate counts only if the layers' outputs and gradients equal those
of the tiles in use. Layers whose GEMMs share a key (`cumo_kernels.tuned.Key`) are tuned together, on the sum of their
times. The result is a table for CUMO_TUNED_TILES; each tile stands beside its card, versions, layers and gain. This
package never tunes on its own.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cumo_kernels import inspect, tiling
from cumo_kernels.backend import interpreted, use_backend
from cumo_kernels.inspect import CASES, Case
from cumo_kernels.ops.moe_mlp import moe_mlp
from cumo_kernels.tiling import GemmTile
from cumo_kernels.tuned import Key, key_of, read_entries

# The values that are tried for each field. Sides: from what a warp group multiplies to what its registers hold.
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
DECODE_TOKENS = 64  # a layer of at most so many tokens serves inference
RUNS = 20
LEAST_GAIN = 0.01  # a smaller difference is noise
# Tiles differ only in the order of their sums, which is a few roundings.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

Timer = Callable[[Callable[[], object]], float]


def shared_bytes(arch: int) -> int:
    """The most shared memory of a block: of the card at hand if it is of this architecture, else from a table.

    Raises:
        ValueError: it is of another architecture, which the table does not have.
    """
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties()
        if properties.major * 10 + properties.minor == arch:
            return int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]
    limits = {tiling.INTERPRETER.arch: max(inspect.SHARED_BYTES.values()), **inspect.SHARED_BYTES}
    if arch not in limits:
        known = ", ".join(f"sm_{known}" for known in inspect.SHARED_BYTES)
        raise ValueError(f"arch: expected the card at hand or one of {known}, got sm_{arch}")
    return limits[arch]


def is_legal(tile: GemmTile, key: Key) -> bool:
    """Whether a tile can be compiled: the buffers of all stages fit in shared memory, slices have at least the 16
    columns of a matrix product, and accumulators leave registers for everything else."""
    operands = tile.BLOCK_M + tile.BLOCK_N * (2 if key.kind == "gated" else 1)
    buffers = operands * tile.BLOCK_K * (4 if key.dtype == "float32" else 2) * tile.num_stages
    accumulators = tile.BLOCK_M * tile.BLOCK_N * (2 if key.kind in ("gated", "dact_gated") else 1)
    return (
        buffers * tile.programs_per_sm <= shared_bytes(key.arch)
        and tile.BLOCK_N // tile.SLICES >= 16
        and accumulators <= 128 * 32 * tile.num_warps  # 128 of 255 registers of each thread
    )


def neighbours(tile: GemmTile, key: Key) -> Iterator[GemmTile]:
    """Legal tiles that differ in one field. The rows of a decode tile (swapped, 16 rows) do not change."""
    for name, choices in CHOICES.items():
        if name == "BLOCK_M" and tile.SWAP:
            continue
        for value in choices:
            changed = replace(tile, **{name: value})  # type: ignore[arg-type]
            if changed != tile and is_legal(changed, key):
                yield changed


def is_trained(case: Case) -> bool:
    """Whether a layer is for training: then its backward is timed too."""
    return case.T > DECODE_TOKENS


class Layer:
    """A case with random inputs."""

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            tensor = torch.randn(shape, generator=generator, device=device) * scale
            return tensor.to(dtype).requires_grad_()

        up = case.F * (2 if case.gated else 1)
        self.case, self.backward = case, is_trained(case)
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
        """Returns the output, and of a layer for training all gradients."""
        x, weight, w1, w2, *biases = self.leaves
        b1, b2 = biases or (None, None)
        case = self.case
        with torch.set_grad_enabled(self.backward), use_backend("triton"):
            y = moe_mlp(x, weight, self.expert_TK, w1, w2, b1, b2, activation=case.activation, gated=case.gated)
        if not self.backward:
            return [y]
        return [y.detach(), *torch.autograd.grad(y, self.leaves, self.dy_TO)]


def agrees(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether all tensors are equal but for rounding."""
    for a, e in zip(actual, expected, strict=True):
        error = (a.double() - e.double()).norm() / e.double().norm().clamp_min(1e-30)
        if not error.item() <= TOLERANCE[e.dtype]:  # NaN is not
            return False
    return True


def median_ms(run: Callable[[], object]) -> float:
    """Median milliseconds of a run on a GPU, between events."""
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


@dataclass
class Timed:
    """A layer with what the search knows of it."""

    layer: Layer
    expected: list[Tensor]
    tiles: dict[Key, GemmTile]
    """Those in use before the search."""
    first_ms: float
    best_ms: float


class Search:
    """Finds tiles for layers that share keys, such that the sum of their times is least.

    Args:
        layers: to be run.
        timer: returns the milliseconds of a function.
        deadline: of `clock`; no candidate is tried after it.
        log: receives a line for each candidate.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        timer: Timer,
        deadline: float,
        log: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        self.timer, self.deadline, self.log, self.clock = timer, deadline, log, clock
        self.found: dict[Key, GemmTile] = {}
        self.timed = [self._begin(layer) for layer in layers]

    def _begin(self, layer: Layer) -> Timed:
        with tiling.use_tiles({}) as asked:
            expected = layer.run()
            ms = self.timer(layer.run)
        return Timed(layer, expected, dict(asked), ms, ms)

    def users(self, key: Key) -> list[Timed]:
        """The layers with a GEMM of this key."""
        return [timed for timed in self.timed if key in timed.tiles]

    def run(self) -> dict[Key, GemmTile]:
        """Returns, per key, a tile that is faster than the one in use."""
        initial = {key: tile for timed in self.timed for key, tile in timed.tiles.items()}
        improved = True
        while improved:
            improved = False
            for key, tile in initial.items():
                improved |= self._improve(key, self.found.get(key, tile))
        self._confirm()
        return self.found

    def _confirm(self) -> None:
        """Time each layer again with the tiles from before and with those found, for clocks drift; give up all that was
        found if it is no gain in sum."""
        if not self.found:
            return
        for timed in self.timed:
            timed.first_ms = self.timer(timed.layer.run)
            with tiling.use_tiles(self.found):
                timed.best_ms = self.timer(timed.layer.run)
        first_ms, best_ms = total_ms(self.timed)
        if best_ms > (1 - LEAST_GAIN) * first_ms:
            self.log(f"{best_ms:.3f} ms is no gain over {first_ms:.3f} ms, timed once more")
            self.found = {}
            for timed in self.timed:
                timed.best_ms = timed.first_ms

    def _improve(self, key: Key, tile: GemmTile) -> bool:
        """Try every neighbour of a tile once, and keep the best; returns whether one is better than the tile."""
        improved, users = False, self.users(key)
        for candidate in neighbours(tile, key):
            if self.clock() >= self.deadline:
                return False
            times = self._try(key, candidate, users)
            if times is not None and sum(times) < (1 - LEAST_GAIN) * total_ms(users)[1]:
                self.found[key], improved = candidate, True
                for timed, ms in zip(users, times, strict=True):
                    timed.best_ms = ms
        return improved

    def _try(self, key: Key, tile: GemmTile, users: Sequence[Timed]) -> list[float] | None:
        """Time of each layer with one more tile changed; None if a result is wrong, or a kernel cannot be compiled or
        launched."""
        label = f"{key.kind} n={key.n} k<={key.k} {tile}"
        with tiling.use_tiles({**self.found, key: tile}):
            try:
                if not all(agrees(timed.layer.run(), timed.expected) for timed in users):
                    self.log(f"wrong   {label}")
                    return None
                times = [self.timer(timed.layer.run) for timed in users]
            except Exception as error:  # noqa: BLE001  out of resources, or a compiler that gives up: not a candidate
                self.log(f"failed  {label}: {type(error).__name__}")
                return None
        self.log(f"{sum(times):7.3f} {label}")
        return times


def total_ms(timed: Sequence[Timed]) -> tuple[float, float]:
    """Milliseconds of layers together, before the search and with the tiles found."""
    return sum(one.first_ms for one in timed), sum(one.best_ms for one in timed)


def entries_of(search: Search, device: torch.device) -> list[dict[str, Any]]:
    """One entry of a table for each tile found. Its gain is that of all tiles found, over the layers that use this one;
    their times stand beside it."""
    import triton

    entries = []
    for key, tile in search.found.items():
        users = search.users(key)
        first_ms, best_ms = total_ms(users)
        entries.append({
            **key._asdict(),
            "tile": asdict(tile),
            "gain_of_layers": round(first_ms / best_ms, 4),
            "layers": {
                timed.layer.case.name: {
                    "pass": "both" if timed.layer.backward else "forward",
                    "before_ms": round(timed.first_ms, 4),
                    "after_ms": round(timed.best_ms, 4),
                }
                for timed in users
            },
            "card": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "torch": torch.__version__,
            "triton": triton.__version__,
        })  # fmt: skip
    return entries


def write_table(path: Path, entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add entries to a table, which stays sorted; returns the entries of the same keys that they replace.

    Raises:
        ValueError: the file exists and is no table.
    """
    merged = {key_of(entry): entry for entry in (read_entries(path) if path.is_file() else [])}
    replaced = [merged[key] for key in map(key_of, entries) if key in merged]
    merged |= {key_of(entry): entry for entry in entries}
    aside = path.with_name(path.name + ".incomplete")
    aside.write_text(json.dumps([merged[key] for key in sorted(merged)], indent=1) + "\n")
    aside.replace(path)
    return replaced


def groups_of(cases: Sequence[Case], keys: Callable[[Case], Iterable[Key]]) -> list[list[Case]]:
    """The cases in groups such that no key is of two groups."""
    groups: list[tuple[set[Key], list[Case]]] = []
    for case in cases:
        all_keys, members = set(keys(case)), [case]
        for group in [group for group in groups if group[0] & all_keys]:
            groups.remove(group)
            all_keys, members = all_keys | group[0], members + group[1]
        groups.append((all_keys, sorted(members, key=cases.index)))
    return [members for _, members in groups]


def compile_candidates(case: Case, arch: str, dtype: str) -> Iterator[tuple[Key, GemmTile, int, int]]:
    """Compile every neighbour of the tiles in use, without a GPU; yields it with the registers and spilled bytes of its
    kernels."""
    from cumo_kernels.kernels.compile import compile_source

    target = inspect.TARGETS[arch]
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
    from cumo_kernels.kernels.launch import target_of

    if not torch.cuda.is_available():
        print("error: expected a GPU to time on, found none; --dry-run compiles without one", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    target, dtype = target_of(torch.empty(0, device=device)), inspect.DTYPES[options.dtype]
    cases = [case for case in CASES if case.name in options.layers]
    for group in groups_of(cases, lambda case: inspect.layer_tiles(case, target, dtype, is_trained(case))):
        names = "; ".join(case.name for case in group)
        print(names, flush=True)
        deadline = time.monotonic() + options.budget * len(group)
        search = Search([Layer(case, dtype, device) for case in group], median_ms, deadline, print, time.monotonic)
        search.run()
        first_ms, best_ms = total_ms(search.timed)
        print(f"{names}: {first_ms:.3f} ms -> {best_ms:.3f} ms, {first_ms / best_ms:.3f} x")
        for entry in write_table(options.out, entries_of(search, device)):
            layers = "; ".join(entry.get("layers", ["unknown layers"]))
            print(f"{options.out}: replaced {entry['kind']} n={entry['n']} k<={entry['k']}, tuned before for {layers}")
        print(f"{options.out}: {len(search.found)} tiles; CUMO_TUNED_TILES={options.out} uses them", flush=True)
        del search
    return 0


if __name__ == "__main__":
    sys.exit(main())
