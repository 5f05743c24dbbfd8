# SPDX-License-Identifier: Apache-2.0
"""Draws the rows of a run: bars, roofline, memory, and time over tokens. Needs matplotlib (extra `demo`).

`python -m benchmarks.plots ROWS.json` draws the rows of an earlier run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.measure import Ceilings
from benchmarks.operations import OPERATIONS
from benchmarks.records import Row
from benchmarks.workloads import CPU, GPU

# The palette of Okabe and Ito, whose colours colour-blind people can tell apart; ours is always the first.
COLOURS = ("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#999999", "#000000", "#F0E442")
BOUND = "#BBBBBB"
WORKLOADS = {workload.name: workload for workload in (*GPU, *CPU)}


def _timed(rows: Iterable[Row], **fields: str) -> list[Row]:
    wanted = {"status": "ok", **fields}
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def _eager(rows: Iterable[Row]) -> list[Row]:
    """Without the times of CUDA graphs: every variant has the others, in every pass."""
    return [row for row in rows if row["method"] != "graph"]


def _unique(rows: Iterable[Row], name: str) -> list[Any]:
    return list(dict.fromkeys(row[name] for row in rows))


def _work(row: Row) -> tuple[int, int]:
    """Operations, and bytes moved at least, of a row's workload and pass."""
    operation, workload = OPERATIONS[row["operation"]], WORKLOADS[row["workload"]]
    itemsize = {"float32": 4, "bfloat16": 2, "float16": 2}[row["dtype"]]
    return operation.flops(workload, row["pass"]), operation.bytes(workload, row["pass"], itemsize)


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    names = _unique(rows, "variant")
    bounds = {row["variant"] for row in rows if row["kind"] == "bound"}
    palette = iter(COLOURS * (1 + len(names) // len(COLOURS)))
    return {name: BOUND if name in bounds else next(palette) for name in names}


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E5E5E5", zorder=0)


def _titled(figure: Figure, title: str, row: Row) -> None:
    figure.suptitle(f"{title}\n", fontsize=12, fontweight="bold")
    about = f"{row['device']}, {row['dtype']}, torch {row['torch']}, triton {row['triton']}, commit {row['commit']}"
    figure.text(0.5, 0.005, about, ha="center", fontsize=7, color="#555555")


def draw_bars(rows: Sequence[Row], operation: str) -> Figure | None:
    """Median times relative to ours: a panel for each workload, a group for each pass and method of timing."""
    rows = _timed(rows, operation=operation)
    workloads = _unique(rows, "workload")
    if not workloads:
        return None
    columns = min(3, len(workloads))
    lines = -(-len(workloads) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(5.2 * columns, 2.9 * lines + 0.8), squeeze=False)
    colours, passes = _colours(rows), list(dict.fromkeys((row["pass"], row["method"]) for row in rows))
    for axes in grid.flat[len(workloads) :]:
        axes.set_visible(False)
    for axes, workload in zip(grid.flat, workloads, strict=False):
        mine = _timed(rows, workload=workload)
        variants = _unique(mine, "variant")
        for index, (which, method) in enumerate(passes):
            timed = _timed(mine, **{"pass": which, "method": method})
            times = {row["variant"]: float(row["p50_ms"]) for row in timed}
            ours = times.get("cumo")
            for place, name in enumerate(variants):
                if name in times and ours:
                    ratio = times[name] / ours
                    x = index + (place + 0.5) / (len(variants) + 1) - 0.5
                    axes.bar(x, ratio, 0.9 / (len(variants) + 1), color=colours[name], zorder=2, label=name)
                    axes.annotate(f"{ratio:.1f}", (x, ratio), ha="center", va="bottom", fontsize=6)
        axes.set_title(workload, fontsize=8)
        axes.set_xticks(range(len(passes)), [f"{which}\n({method})" for which, method in passes], fontsize=7)
        axes.axhline(1, color="#444444", linewidth=0.8, zorder=3)
        _tidy(axes)
    grid[0, 0].set_ylabel("time / ours (lower is faster)")
    _legend(figure, grid.flat)
    _titled(figure, f"{operation}: time relative to cumo", rows[0])
    return figure


def _legend(figure: Figure, all_axes: Iterable[Axes]) -> None:
    handles = {}
    for axes in all_axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles, loc="lower center", ncols=min(5, len(handles)), fontsize=8, frameon=False,
                  bbox_to_anchor=(0.5, 0.02))  # fmt: skip
    figure.tight_layout(rect=(0, 0.09, 1, 0.97))


def draw_roofline(rows: Sequence[Row], ceilings: Ceilings) -> Figure | None:
    """Achieved rates over arithmetic intensity, below the measured ceilings of the machine."""
    rows = [row for row in _eager(_timed(rows, operation="layer")) if row["kind"] != "bound"]
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(8, 5.2))
    colours = _colours(rows)
    intensities = []
    for row in rows:
        flops, moved = _work(row)
        intensities.append(flops / moved)
        axes.scatter(
            intensities[-1], float(row["tflops"]), color=colours[row["variant"]], s=22, zorder=3, label=row["variant"]
        )
    ridge = ceilings.flops / ceilings.bytes
    low, high = min([*intensities, ridge]) / 2, max([*intensities, ridge]) * 2
    axes.plot(
        [low, ridge, high], [low * ceilings.bytes / 1e12, *[ceilings.flops / 1e12] * 2], color="#444444", zorder=2
    )
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte moved at least", ylabel="TFLOP/s")
    _tidy(axes)
    _legend(figure, [axes])
    _titled(figure, "layer: roofline of measured ceilings", rows[0])
    return figure


def draw_memory(rows: Sequence[Row]) -> Figure | None:
    """Peak memory of forward and backward together."""
    rows = [row for row in _eager(_timed(rows, operation="layer", **{"pass": "both"})) if row["peak_mb"]]
    if not rows:
        return None
    workloads, variants, colours = _unique(rows, "workload"), _unique(rows, "variant"), _colours(rows)
    figure, axes = plt.subplots(figsize=(max(7, 1.7 * len(workloads)), 4.8))
    for row in rows:
        place = variants.index(row["variant"])
        x = workloads.index(row["workload"]) + (place + 0.5) / (len(variants) + 1) - 0.5
        axes.bar(x, float(row["peak_mb"]) / 1024, 0.9 / (len(variants) + 1), color=colours[row["variant"]], zorder=2,
                 label=row["variant"])  # fmt: skip
    axes.set_xticks(range(len(workloads)), workloads, fontsize=7, rotation=20, ha="right")
    axes.set_ylabel("GiB beyond inputs and weights")
    axes.set_yscale("log")
    _tidy(axes)
    _legend(figure, [axes])
    _titled(figure, "layer: peak memory of forward and backward", rows[0])
    return figure


def draw_scaling(rows: Sequence[Row]) -> Figure | None:
    """Time over the number of tokens, for workloads that are otherwise equal."""
    rows = [row for row in _eager(_timed(rows, operation="layer")) if "skewed" not in row["workload"]]
    families: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        families.setdefault(tuple(row[letter] for letter in "KEDFO"), []).append(row)
    families = {key: family for key, family in families.items() if len(_unique(family, "T")) > 1}
    if not families:
        return None
    figure, grid = plt.subplots(1, len(families), figsize=(5.4 * len(families), 4.6), squeeze=False)
    colours = _colours(rows)
    for axes, family in zip(grid.flat, families.values(), strict=True):
        for name in _unique(family, "variant"):
            points = sorted(
                (int(row["T"]), float(row["p50_ms"])) for row in _timed(family, variant=name, **{"pass": "both"})
            )
            axes.plot(*zip(*points, strict=True), "o-", color=colours[name], markersize=4, label=name)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms, forward and backward")
        axes.set_title(family[0]["workload"].split(",")[0], fontsize=9)
        _tidy(axes)
    _legend(figure, grid.flat)
    _titled(figure, "layer: time over tokens", rows[0])
    return figure


def draw(rows: Sequence[Row], ceilings: Ceilings, stem: Path) -> list[Path]:
    """Write every picture for which there are rows, as `stem`-NAME.png; returns their paths."""
    figures = {f"bars-{operation}": draw_bars(rows, operation) for operation in _unique(rows, "operation")}
    figures |= {"roofline": draw_roofline(rows, ceilings), "memory": draw_memory(rows), "scaling": draw_scaling(rows)}
    paths = []
    for name, figure in figures.items():
        if figure is None:
            continue
        paths.append(stem.with_name(f"{stem.name}-{name}.png"))
        figure.savefig(paths[-1], dpi=130)
        plt.close(figure)
    return paths


def ceilings_of(rows: Sequence[Row]) -> Ceilings:
    """The ceilings with which the floors of the rows were computed."""
    work = [(_work(row), float(row["floor_ms"]) / 1e3) for row in _timed(rows)]
    return Ceilings(max(flops / floor for (flops, _), floor in work), max(moved / floor for (_, moved), floor in work))


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__.split("\n")[0])
    parser.add_argument("rows", type=Path, help="a .json file that benchmarks.run wrote")
    path = parser.parse_args().rows
    rows = json.loads(path.read_text())
    print(*draw(rows, ceilings_of(rows), path.with_suffix("")), sep="\n")


if __name__ == "__main__":
    main()
