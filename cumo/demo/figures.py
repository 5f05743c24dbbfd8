# SPDX-License-Identifier: Apache-2.0
"""Figures of the report, as SVG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from cumo.inference.routing import ExpertMaps, PictureRouting

# Okabe and Ito's palette, which people of every colour vision tell apart
EXPERTS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
LINES = {
    "pretrain": "#56B4E9",
    "prefinetune": "#0072B2",
    "instruct": "#D55E00",
    "instruct-dense": "#009E73",
    "instruct-without-aux": "#CC79A7",
    "blank pictures": "#999999",
}
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8f98",
    "axes.labelcolor": "#3c4149",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": "#3c4149",
    "ytick.color": "#3c4149",
    "grid.color": "#e4e6ea",
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "cumo",  # the same figure is the same file
    "legend.frameon": False,
}

Record = Mapping[str, Any]


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def _ink(colour: str) -> str:
    """Colour of text on `colour`: black on light ones, white on dark ones."""
    red, green, blue = matplotlib.colors.to_rgb(colour)
    return "#1f2328" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.55 else "white"


def _smooth(values: Sequence[float]) -> Any:
    """Mean over a window of a fortieth of the curve."""
    width = max(1, len(values) // 40)
    padded = np.pad(np.asarray(values, dtype=float), (width - 1, 0), mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def losses(logs: Mapping[str, Sequence[Record]]) -> str:
    """Language-model loss over the steps of all stages, one behind the other; controls begin where `instruct` does."""
    with matplotlib.rc_context(STYLE):
        figure = _figure(9, 3.2)
        axes = figure.subplots()
        begin = 0
        for name, log in logs.items():
            if not name.startswith("instruct-"):
                first = begin
                begin += log[-1]["step"]
                axes.axvline(begin, color="#c9ccd2", linewidth=0.8)
            steps = [first + record["step"] for record in log]
            values = [record["lm_loss"] for record in log]
            style = "--" if name.startswith("instruct-") else "-"
            axes.plot(steps, _smooth(values), style, color=LINES[name], linewidth=1.6, label=name)
            if style == "-":
                axes.plot(steps, values, color=LINES[name], linewidth=0.5, alpha=0.25)
        axes.set(xlabel="step", ylabel="language-model loss", yscale="log", xlim=(0, begin))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.grid(axis="y")
        axes.legend(ncols=2)
        return _svg(figure)


def accuracies(by_kind: Mapping[str, Mapping[str, float]]) -> str:
    """Bars by kind of question, one of a group for each model."""
    with matplotlib.rc_context(STYLE):
        figure = _figure(9, 3.2)
        axes = figure.subplots()
        kinds = list(next(iter(by_kind.values())))
        width = 0.8 / len(by_kind)
        for index, (name, values) in enumerate(by_kind.items()):
            places = np.arange(len(kinds)) + (index - (len(by_kind) - 1) / 2) * width
            bars = [100 * values[kind] for kind in kinds]
            axes.bar(places, bars, 0.9 * width, color=LINES[name], label=name)
        axes.set(ylabel="right answers, %", ylim=(0, 100))
        axes.set_xticks(range(len(kinds)), kinds)
        axes.tick_params(axis="x", length=0)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        figure.legend(loc="outside upper center", ncols=len(by_kind))
        return _svg(figure)


def loads(panels: Mapping[str, Mapping[str, Sequence[float]]], least: float) -> str:
    """Stacked bars of the experts' shares, a panel for each model, a bar for each layer.

    Args:
        panels: title -> layer -> shares.
        least: share that no expert should be below; marked where one is.
    """
    with matplotlib.rc_context(STYLE):
        figure = _figure(9, 0.9 + 0.42 * max(map(len, panels.values())))
        all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (title, layers) in zip(all_axes, panels.items(), strict=True):
            for row, shares in enumerate(layers.values()):
                left = 0.0
                for expert, share in enumerate(shares):
                    colour = EXPERTS[expert % len(EXPERTS)]
                    axes.barh(row, 100 * share, left=left, height=0.72, color=colour, edgecolor="white", linewidth=0.8)
                    if share >= 0.09:
                        text = {"color": _ink(colour), "fontsize": 8.5, "fontweight": "bold"}
                        axes.text(left + 50 * share, row, f"{100 * share:.0f}", ha="center", va="center", **text)
                    left += 100 * share
                if min(shares) < least:
                    axes.text(101, row, f"{100 * min(shares):.1f} %", va="center", fontsize=8.5, color="#b3261e")
            axes.set(xlim=(0, 100), title=title, xlabel="share of the tokens, %")
            axes.set_yticks(range(len(layers)), list(layers))
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
        all_axes[0].invert_yaxis()
        experts = max(len(shares) for layers in panels.values() for shares in layers.values())
        _legend(figure, experts)
        return _svg(figure)


def aux_losses(logs: Mapping[str, Sequence[Record]]) -> str:
    """Balance and z-losses of encoder and connector over the steps of the stages with experts."""
    names = {
        "vision_balance": "encoder: balance",
        "vision_z": "encoder: z",
        "connector_balance": "connector: balance",
        "connector_z": "connector: z",
    }
    with matplotlib.rc_context(STYLE):
        figure = _figure(9, 2.5)
        for axes, (key, title) in zip(figure.subplots(1, len(names)), names.items(), strict=True):
            for name, log in logs.items():
                values = [record[key] for record in log]
                axes.plot(
                    [record["step"] for record in log],
                    _smooth(values),
                    "--" if name.startswith("instruct-") else "-",
                    color=LINES[name],
                    linewidth=1.6,
                    label={"instruct": "with aux losses", "instruct-without-aux": "coefficients zero"}[name],
                )
            axes.set(title=title, xlabel="step")
            axes.grid(axis="y")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(logs))
        return _svg(figure)


def routing(pictures: Sequence[PictureRouting]) -> str:
    """Pictures, and over each the expert of every patch: first choices in the last block by scale, and the connector's.

    A row for each picture.
    """
    with matplotlib.rc_context(STYLE):
        columns = 2 + len(pictures[0].vision)
        figure = _figure(9, 9 / columns * len(pictures) + 0.4)
        grid = figure.subplots(len(pictures), columns, squeeze=False)
        for row, seen in zip(grid, pictures, strict=True):
            maps = [*seen.vision, *([seen.connector] if seen.connector is not None else [])]
            row[0].imshow(seen.picture)
            for axes, of_scale in zip(row[1:], maps, strict=True):
                _overlay(axes, seen, of_scale)
            for axes in row:
                axes.set_axis_off()
        last = pictures[0].vision[0].experts.shape[0]
        titles = ["picture", *(f"block {last}, scale {of_scale.scale}" for of_scale in pictures[0].vision), "connector"]
        for axes, title in zip(grid[0], titles, strict=True):
            axes.set_title(title, loc="center")
        _legend(figure, pictures[0].vision[0].num_experts)
        return _svg(figure)


def _overlay(axes: Any, seen: PictureRouting, of_scale: ExpertMaps) -> None:
    """The picture under the colours of the experts, and the borders of its patches."""
    first = of_scale.experts[-1, 0].numpy()
    colours = np.array([matplotlib.colors.to_rgb(EXPERTS[index % len(EXPERTS)]) for index in first.flatten()])
    side = seen.picture.width
    axes.imshow(seen.picture.convert("L"), cmap="gray", vmin=0, vmax=255)
    axes.imshow(colours.reshape(*first.shape, 3), alpha=0.62, extent=(0, side, side, 0), interpolation="nearest")
    for line in range(1, len(first)):
        place = side * line / len(first)
        axes.axhline(place, color="white", linewidth=0.6, alpha=0.7)
        axes.axvline(place, color="white", linewidth=0.6, alpha=0.7)


def _legend(figure: Figure, experts: int) -> None:
    handles = [Patch(color=EXPERTS[index % len(EXPERTS)], label=f"expert {index + 1}") for index in range(experts)]
    figure.legend(handles=handles, loc="outside upper center", ncols=experts)
