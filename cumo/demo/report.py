# SPDX-License-Identifier: Apache-2.0
"""The report of a run: one page that needs nothing else."""

from __future__ import annotations

import base64
import html
import importlib.resources
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from cumo.demo import dataset, figures
from cumo.demo.evaluate import loads_by_layer
from cumo.demo.pipeline import ANSWERS, DATA, DENSE, REPORT, STAGES, WITHOUT_AUX, Demo
from cumo.demo.scenes import NUMBERS
from cumo.inference import picture_routing
from cumo.models.pictures import to_rgb

LEAST_LOAD = 0.05
ROUTED_PICTURES = 4
SAMPLES = 8
NONE = "<p>None.</p>"
MEANINGS = {
    "language": "a small language model, on captions and questions in words",
    "clip": "a small CLIP, contrastively, on pictures of one digit",
    "pretrain": "the connector alone, on captions",
    "prefinetune": "all of the dense model, on questions",
    "instruct": "co-upcycled: encoder and connector with {experts} experts, top {top_k}",
    DENSE: "the same steps without experts",
    WITHOUT_AUX: "the same with coefficients of zero",
}


def write(demo: Demo, results: Mapping[str, Any]) -> Path:
    """Write the report of a finished run into its folder.

    Args:
        demo: that ran.
        results: of it.
    """
    logs = {name: demo.log(name) for name in (*STAGES, DENSE, WITHOUT_AUX)}
    blank = results["blank_pictures"]["by_kind"]
    kinds = {name: results["accuracy_by_kind"][name] for name in (*STAGES, DENSE)}
    panels = {
        "upcycled, before training": loads_by_layer(results["expert_load_before"]),
        "after training": loads_by_layer(results["expert_load"]),
        "after training, coefficients zero": loads_by_layer(results["expert_load_without_aux"]),
    }
    answered = _answered(demo)
    page = _template("report.html").substitute(
        lead=_lead(results),
        highlights=_highlights(results),
        about_stages=_about_stages(results),
        table=_table(results),
        losses=figures.losses(logs),
        accuracies=figures.accuracies({**kinds, "blank pictures": blank}),
        about_loads=(
            "Share of the choices that went to each expert, by layer, over the pictures of the test; both scales "
            f"together. A share below {LEAST_LOAD:.0%} is named in red."
        ),
        loads=figures.loads(panels, LEAST_LOAD),
        aux_losses=figures.aux_losses({name: logs[name] for name in ("instruct", WITHOUT_AUX)}),
        routing=figures.routing(_routed(demo)),
        right=_samples(pair for pair in answered if pair[0].answer == pair[1]) or NONE,
        wrong=_samples(pair for pair in answered if pair[0].answer != pair[1]) or NONE,
        footer=_footer(results),
    )
    path = demo.out / REPORT
    aside = path.with_name(f".{path.name}.incomplete")
    aside.write_text(page, encoding="utf-8")
    return aside.replace(path)


def table(results: Mapping[str, Any]) -> str:
    """The stages as text: name, steps, loss, accuracy, seconds."""
    lines = [f"{'stage':22}{'steps':>7}{'loss':>9}{'accuracy':>10}{'seconds':>9}"]
    for row in _rows(results):
        accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.1%}"
        steps, loss, seconds = (
            f"{row['steps']}" if row["steps"] is not None else "",
            f"{row['loss']:.4f}" if row["loss"] is not None else "",
            f"{row['seconds']:.0f}" if row["seconds"] is not None else "",
        )
        lines.append(f"{row['name']:22}{steps:>7}{loss:>9}{accuracy:>10}{seconds:>9}")
    return "\n".join(lines)


def least_load(load: Mapping[str, Any]) -> float:
    """The smallest share of any expert in any layer."""
    return min(min(shares) for shares in loads_by_layer(dict(load)).values())


def _rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The stages, the final model without pictures, and the controls."""
    blank = {"name": "instruct, blank picture", "steps": None, "loss": None, "seconds": None}
    blank["accuracy"] = results["blank_pictures"]["accuracy"]
    return [*results["stages"], blank, results["control"], results["without_aux"]]


def _template(name: str) -> Template:
    return Template(importlib.resources.files("cumo.demo").joinpath(name).read_text(encoding="utf-8"))


def _final(results: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(stage for stage in results["stages"] if stage["name"] == "instruct")


def _lead(results: Mapping[str, Any]) -> str:
    settings = results["settings"]
    return (
        "A vision encoder and a language model, trained here in place of downloaded ones, became a multimodal model "
        f"with co-upcycled experts: {settings['training_scenes']} scenes of handwritten digits, "
        f"{results['questions']} questions on other digits to test it."
    )


def _highlights(results: Mapping[str, Any]) -> str:
    least = least_load(results["expert_load"])
    tiles = {
        "of the answers right after the last stage": f"{_final(results)['accuracy']:.1%}",
        "with blank pictures": f"{results['blank_pictures']['accuracy']:.1%}",
        "the same steps without experts": f"{results['control']['accuracy']:.1%}",
        "least load of an expert": f"{least:.1%}",
        "least load with coefficients of zero": f"{least_load(results['expert_load_without_aux']):.1%}",
    }
    return "".join(f"<div><b>{value}</b><span>{html.escape(name)}</span></div>" for name, value in tiles.items())


def _about_stages(results: Mapping[str, Any]) -> str:
    return (
        "Accuracy over all questions of the test, after each stage. The last three rows are to compare with: the final "
        "model when every picture is blank, and the last stage once more without experts and with auxiliary losses of "
        "weight zero. Losses are those of the language model. Seconds are those of training; with the answers they "
        f"come to {results['seconds']:.0f}."
    )


def _table(results: Mapping[str, Any]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("stage", "steps", "loss", "accuracy", "seconds"))
    body = []
    for row in _rows(results):
        meaning = MEANINGS.get(row["name"], "its answers when there is nothing to see").format(**results["settings"])
        cells = [
            f"{html.escape(row['name'])}<small>{html.escape(meaning)}</small>",
            "" if row["steps"] is None else str(row["steps"]),
            "" if row["loss"] is None else f"{row['loss']:.4f}",
            "" if row["accuracy"] is None else f"{row['accuracy']:.1%}",
            "" if row["seconds"] is None else f"{row['seconds']:.0f}",
        ]
        kind = ' class="main rule"' if row["name"] == "instruct" else ""
        body.append(f"<tr{kind}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _answered(demo: Demo) -> list[tuple[dataset.TestQuestion, str]]:
    texts = json.loads((demo.out / ANSWERS / "instruct.json").read_text())["texts"]
    return list(zip(dataset.read_test(demo.out / DATA), texts, strict=True))


def _routed(demo: Demo) -> list[Any]:
    """Routing of the first pictures of the test with the most digits."""
    counted = [question for question in dataset.read_test(demo.out / DATA) if question.kind == "how many"]
    counted.sort(key=lambda question: -NUMBERS.index(question.answer))
    pipeline = demo.pipeline("instruct")
    pictures = [to_rgb(question.picture) for question in counted[:ROUTED_PICTURES]]
    return [picture_routing(pipeline, picture) for picture in pictures]


def _samples(answered: Iterable[tuple[dataset.TestQuestion, str]]) -> str:
    """Questions of different pictures and, as far as there are, of all kinds in turn."""
    chosen: list[str] = []
    seen: set[Path] = set()
    turn = 0
    pairs: Sequence[tuple[dataset.TestQuestion, str]] = list(answered)
    kinds = list(dict.fromkeys(question.kind for question, _ in pairs))
    by_kind = {kind: iter([pair for pair in pairs if pair[0].kind == kind]) for kind in kinds}
    while kinds and len(chosen) < SAMPLES:
        kind = kinds[turn % len(kinds)]
        pair = next((pair for pair in by_kind[kind] if pair[0].picture not in seen), None)
        if pair is None:
            kinds.remove(kind)
            continue
        seen.add(pair[0].picture)
        chosen.append(_sample(*pair))
        turn += 1
    return "".join(chosen)


def _sample(question: dataset.TestQuestion, text: str) -> str:
    data = base64.b64encode(question.picture.read_bytes()).decode()
    right = text == question.answer
    wanted = "" if right else f" (right: {html.escape(question.answer)})"
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt=""><figcaption>{html.escape(question.text)}<br>'
        f'<span class="{"right" if right else "wrong"}">{html.escape(text) or "nothing"}</span>{wanted}'
        "</figcaption></figure>"
    )


def _footer(results: Mapping[str, Any]) -> str:
    return (
        f"Seed {results['settings']['seed']}. Digits: scikit-learn's copy of the optical recognition data set of "
        "Alpaydin and Kaynak (UCI). All figures are in results.json beside this page, all answers in the folder "
        "answers; the models open with cumo chat, cumo serve and cumo eval."
    )
