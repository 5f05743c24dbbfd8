# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.run`: time every operation against every baseline that is installed.

Outputs and gradients of a variant first have to agree with the float64 reference; otherwise it is not timed. Each row
names machine, versions, commit and the method of timing, and is appended to a CSV file at once. Times are compared
within one method only.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gate import Gate, Verdict, cotangent_of
from benchmarks.measure import Ceilings, Timing, count_launches, measure_ceilings, peak_bytes, time_call, time_replay
from benchmarks.operations import OPERATIONS, Operation
from benchmarks.records import RESULTS, Row, Writer, device_name, environment, slug, table
from benchmarks.variants import Call, MissingVariantError, Variant
from benchmarks.workloads import CPU, GPU, PASSES, LayerInputs, Workload, make_layer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OURS = "cumo"
# The launches of a layer cost Python some 0.1 to 0.3 ms. Where no more work than this is due, all variants are timed in
# a CUDA graph too.
GRAPH_BELOW_MS = 0.5


def timed_call(call: Call, which: str) -> Callable[[], object]:
    """The function to be timed for a pass."""
    if which == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return call.run()

        return forward
    with torch.no_grad():
        cotangent = cotangent_of(call, call.run())
    if which == "both":
        return lambda: torch.autograd.grad(call.run(), call.leaves, cotangent)
    y = call.run()
    return lambda: torch.autograd.grad(y, call.leaves, cotangent, retain_graph=True)


class Bench:
    """Measures the variants of one operation on one workload in one dtype."""

    def __init__(
        self, operation: Operation, inputs: LayerInputs, passes: Sequence[str], ceilings: Ceilings, budget_s: float
    ) -> None:
        self.operation, self.inputs, self.passes = operation, inputs, passes
        self.ceilings, self.budget_s = ceilings, budget_s
        self.gate = Gate(operation.exact, inputs, backward=any(which != "forward" for which in passes))

    def rows(self, name: str, variant: Variant) -> Iterator[Row]:
        """Yields a row for each pass and method of timing; a single row without a time if the variant is missing, fails
        or is wrong."""
        try:
            verdict = self.gate.judge(variant.prepare, variant.exact)
            if not verdict.passed:
                reason = f"{verdict.worst} is off by {verdict.error:.1e}, allowed {verdict.allowed:.1e}"
                yield self._row(name, variant, "all", "wrong", verdict, reason)
                return
            for which in self.passes:
                for timed in self._measured(variant, which):
                    yield self._row(name, variant, which, "ok", verdict) | timed
        except MissingVariantError as error:
            yield self._row(name, variant, "all", "missing", reason=str(error))
        except Exception as error:  # noqa: BLE001  other people's code: its row says how it failed, the others go on
            if variant.kind == "ours":
                raise
            yield self._row(name, variant, "all", "failed", reason=f"{type(error).__name__}: {error}"[:300])

    def _row(
        self, name: str, variant: Variant, which: str, status: str, verdict: Verdict | None = None, reason: str = ""
    ) -> Row:
        workload, device = self.inputs.workload, self.inputs.x_TD.device
        sizes = {letter: getattr(workload.case, letter) for letter in "TKEDFO"}
        return {
            **environment(device),
            "operation": self.operation.name,
            "workload": workload.name,
            **sizes,
            "dtype": str(self.inputs.x_TD.dtype).removeprefix("torch."),
            "pass": which,
            "variant": name,
            "kind": variant.kind,
            "status": status,
            "reason": reason.replace("\n", " "),
            "error": f"{verdict.error:.2e}" if verdict else "",
            "allowed": f"{verdict.allowed:.2e}" if verdict else "",
            **dict.fromkeys(("p20_ms", "p50_ms", "p80_ms", "runs", "method", "floor_ms", "of_floor", "tflops"), ""),
            **dict.fromkeys(("peak_mb", "launches"), ""),
        }

    def _measured(self, variant: Variant, which: str) -> Iterator[Row]:
        """The measured fields, once for each method of timing."""
        inputs = self.inputs
        device, itemsize = inputs.x_TD.device, inputs.x_TD.element_size()
        run = timed_call(variant.prepare(inputs), which)
        flops = self.operation.flops(inputs.workload, which)
        floor = self.ceilings.floor_ms(flops, self.operation.bytes(inputs.workload, which, itemsize))
        timings = timings_of(run, device, self.budget_s, may_capture=which != "backward" and floor < GRAPH_BELOW_MS)
        peak, launches = peak_bytes(run, device), count_launches(run, device)
        for timing in timings:
            yield {
                "p20_ms": f"{timing.p20:.4g}",
                "p50_ms": f"{timing.p50:.4g}",
                "p80_ms": f"{timing.p80:.4g}",
                "runs": timing.runs,
                "method": timing.method,
                "floor_ms": f"{floor:.4g}",
                "of_floor": f"{floor / timing.p50:.3f}",
                "tflops": f"{flops / timing.p50 / 1e9:.4g}",
                "peak_mb": "" if peak is None else f"{peak / 2**20:.1f}",
                "launches": "" if launches is None else launches,
            }


def timings_of(run: Callable[[], object], device: torch.device, budget_s: float, may_capture: bool) -> list[Timing]:
    """Times of `run` by every method that applies.

    Args:
        run: as in `time_call`.
        device: as in `time_call`.
        budget_s: as in `time_call`, for each method.
        may_capture: on a GPU, also replay it from a CUDA graph if it can be captured. A backward by itself cannot:
            autograd runs it on the stream of its forward.
    """
    timings = [time_call(run, device, budget_s)]
    if may_capture and device.type == "cuda":
        replayed = time_replay(run, budget_s)
        timings += [] if replayed is None else [replayed]
    return timings


def summary(rows: Sequence[Row]) -> str:
    """For each operation, workload, pass and method of timing, the time of every variant, also relative to ours."""
    parts = []
    keys = dict.fromkeys((row["operation"], row["workload"], row["dtype"]) for row in rows)
    for operation, workload, dtype in keys:
        mine = [
            row for row in rows if (row["operation"], row["workload"], row["dtype"]) == (operation, workload, dtype)
        ]
        lines = []
        for timing in dict.fromkeys((row["pass"], row["method"]) for row in mine if row["status"] == "ok"):
            timed = [row for row in mine if (row["pass"], row["method"]) == timing]
            ours = next((float(row["p50_ms"]) for row in timed if row["variant"] == OURS), None)
            lines += [_line(row, ours) for row in timed]
        lines += [_line(row, None) for row in mine if row["status"] != "ok"]
        right = ("ms", "p20", "p80", "x ours", "% of floor", "TFLOP/s", "MB", "launches")
        parts.append(f"{operation}: {workload}, {dtype}\n{table(lines, right)}")
    return "\n\n".join(parts)


def _line(row: Row, ours: float | None) -> dict[str, str]:
    ok = row["status"] == "ok"
    return {
        "pass": row["pass"] if ok else "",
        "timed by": row["method"],
        "variant": row["variant"],
        "ms": row["p50_ms"],
        "p20": row["p20_ms"],
        "p80": row["p80_ms"],
        "x ours": f"{float(row['p50_ms']) / ours:.2f}" if ok and ours else "",
        "% of floor": f"{100 * float(row['of_floor']):.0f}" if ok else "",
        "TFLOP/s": row["tflops"],
        "MB": row["peak_mb"],
        "launches": str(row["launches"]),
        "": "" if ok else f"{row['status']}: {row['reason'][:90]}",
    }


def _chosen(arguments: argparse.Namespace, device: torch.device) -> tuple[list[Operation], list[Workload]]:
    workloads = [w for w in (GPU if device.type == "cuda" else CPU) if arguments.shape.lower() in w.name.lower()]
    if not workloads:
        raise ValueError(f"--shape: expected part of a workload's name (see --list), got {arguments.shape!r}")
    return [OPERATIONS[name] for name in arguments.op or OPERATIONS], workloads


def _variants(operation: Operation, wanted: Sequence[str] | None) -> dict[str, Variant]:
    """Our variants, and of the others those in `wanted`."""
    return {
        name: variant
        for name, variant in operation.variants.items()
        if wanted is None or name in wanted or variant.kind == "ours"
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    baselines = sorted({n for o in OPERATIONS.values() for n, v in o.variants.items() if v.kind != "ours"})
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.split("\n")[0])
    parser.add_argument("--op", nargs="+", choices=OPERATIONS, help="operations; all by default")
    parser.add_argument("--shape", default="", help="workloads whose name contains this")
    parser.add_argument("--baseline", nargs="+", choices=baselines, help="variants beside ours; all by default")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda if there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of measuring for each time")
    parser.add_argument("--quick", action="store_true", help="a twentieth of a second for each")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows; default: %(default)s")
    parser.add_argument("--plots", action="store_true", help="draw the rows of this run too; needs matplotlib")
    parser.add_argument("--list", action="store_true", help="list operations, variants and workloads")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> list[Row]:
    """Measure everything that the command line asks for; returns the rows."""
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = DTYPES[arguments.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    budget = 0.05 if arguments.quick else arguments.budget
    operations, workloads = _chosen(arguments, device)
    ceilings = measure_ceilings(dtype, device, budget)
    print(
        f"{device_name(device)}: {ceilings.flops / 1e12:.4g} TFLOP/s of a large {arguments.dtype or dtype} product, "
        f"{ceilings.bytes / 1e9:.4g} GB/s of a large copy; floors are of these",
        flush=True,
    )
    writer = Writer(arguments.out / f"{slug(device_name(device))}.csv")
    begin = time.monotonic()
    for workload in workloads:
        inputs = make_layer(workload, dtype, device)
        for operation in operations:
            first = len(writer.rows)
            bench = Bench(operation, inputs, arguments.passes, ceilings, budget)
            for name, variant in _variants(operation, arguments.baseline).items():
                for row in bench.rows(name, variant):
                    writer.write(row)
            print(f"\n{summary(writer.rows[first:])}", flush=True)
            del bench
    print(f"\n{len(writer.rows)} rows in {time.monotonic() - begin:.0f} s: {writer.path}, {writer.write_json()}")
    if arguments.plots:
        from benchmarks.plots import draw

        print(*draw(writer.rows, ceilings, writer.path.with_suffix("")), sep="\n")
    return writer.rows


def listing() -> str:
    """The names of operations, variants and workloads."""
    lines = [f"{o.name}: " + ", ".join(f"{n} ({v.kind})" for n, v in o.variants.items()) for o in OPERATIONS.values()]
    lines += [f"{place}: {w.name}" for place, group in (("GPU", GPU), ("CPU", CPU)) for w in group]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; 1 if one of our own variants is wrong."""
    options = parse(arguments)
    if options.list:
        print(listing())
        return 0
    try:
        rows = run(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(any(row["kind"] == "ours" and row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
