# SPDX-License-Identifier: Apache-2.0
"""Results beside the published ones, as JSON and as a Markdown table."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cumo.eval.driver import Result

PAPER = {
    "CuMo Mistral-7B": {
        "scienceqa": 73.9,
        "textvqa": 67.0,
        "gqa": 64.9,
        "pope": 86.7,
        "mme": 1548.6,
        "mmbench": 73.0,
        "mmbench_cn": 66.6,
        "mmvet": 51.0,
        "vqav2": 82.2,
        "llava_wild": 85.7,
        "seed": 72.1,
        "mmmu": 39.1,
    },
    "CuMo Mixtral-8x7B": {
        "scienceqa": 77.9,
        "textvqa": 66.0,
        "gqa": 63.8,
        "pope": 85.7,
        "mme": 1639.5,
        "mmbench": 75.3,
        "mmbench_cn": 68.0,
        "mmvet": 48.7,
        "vqav2": 81.8,
        "llava_wild": 84.7,
        "seed": 73.2,
        "mmmu": 45.0,
    },
}
"""Table 1 of arXiv 2405.05949. MathVista is in the published scripts but not in the paper."""

_PACKAGES = ("cumo", "torch", "transformers", "tokenizers", "pillow", "numpy")


def versions() -> dict[str, str | None]:
    """Installed versions of what figures may depend on; None of what is not installed as a package."""
    result: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            result[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            result[name] = None
    return result


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ("git", "-C", str(Path(__file__).parent), *arguments), capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str | None:
    """Commit of this source tree, `-dirty` where it was changed; None outside of a checkout."""
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:  # installed below somebody else's checkout
        return None
    return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def as_json(results: Sequence[Result], about: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that is known about the results.

    Args:
        results: of `evaluate`.
        about: the run: model, options.
    """
    entries = {
        result.task.name: {
            "value": result.scores.value,
            "metric": result.scores.metric,
            "note": result.scores.note,
            "paper": {model: figures.get(result.task.name) for model, figures in PAPER.items()},
            "details": result.scores.details,
        }
        for result in results
    }
    return {**about, "commit": commit(), "versions": versions(), "results": entries}


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def as_markdown(results: Sequence[Result], model: str) -> str:
    """A table: a benchmark a row, this model's figure and the paper's, what the figure is, what to know about it."""
    header = ("benchmark", model, *PAPER, "figure", "note")
    rows = [
        (
            result.task.title,
            _figure(result.scores.value),
            *(_figure(figures.get(result.task.name)) for figures in PAPER.values()),
            result.scores.metric,
            result.scores.note,
        )
        for result in results
    ]
    rule = ("---", *("---:" for _ in range(1 + len(PAPER))), "---", "---")
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (header, rule, *rows)]
    return "\n".join(lines) + "\n"


def write(results: Sequence[Result], about: Mapping[str, Any], output: Path) -> str:
    """Write `results.json` and `results.md` into a folder.

    Args:
        results: of `evaluate`.
        about: the run; its `model` has a `name`.
        output: the folder.

    Returns:
        The table.
    """
    content = as_json(results, about)
    table = as_markdown(results, content["model"]["name"])
    known = ", ".join(f"{name} {version}" for name, version in content["versions"].items() if version)
    text = f"# Evaluation of {content['model']['name']}\n\n{table}\nCommit {content['commit'] or 'unknown'}; {known}.\n"
    (output / "results.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (output / "results.md").write_text(text, encoding="utf-8")
    return table
