# SPDX-License-Identifier: Apache-2.0
"""The demo itself, with a few steps of every stage: what it writes, how it goes on, what it refuses."""

import json
import os
import re

import pytest
import torch
from PIL import Image

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
pytest.importorskip("matplotlib", reason="draws the report")
pytest.importorskip("accelerate", reason="the trainer of transformers needs it")

from cumo.cli import main
from cumo.data.encoding import SampleEncoder
from cumo.data.formats import parse_row
from cumo.demo import dataset, evaluate, pipeline, scenes
from cumo.demo.language import TEMPLATE
from cumo.demo.pipeline import DENSE, STAGES, WITHOUT_AUX, Demo, Outcome
from cumo.demo.settings import QUICK
from cumo.inference import CuMoPipeline, GenerationOptions
from cumo.models.multiscale import resize, split_tiles
from cumo.models.prompts import IGNORE_INDEX

PARTS = ("language", "clip")
SECTIONS = (
    "Stages", "Loss", "Answers by kind of question", "Load of the experts", "Auxiliary losses",
    "Where each patch goes", "Right answers", "Wrong answers",
)  # fmt: skip


def stamps(out):
    """When each stage's results were written."""
    names = [f"pretrained/{name}/result.json" for name in PARTS]
    names += [f"{name}/final/result.json" for name in (*STAGES, DENSE, WITHOUT_AUX)]
    return {name: os.stat(out / name).st_mtime_ns for name in names if (out / name).exists()}


class StoppedError(Exception):
    """In place of Ctrl-C."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A quick run, interrupted before the third stage of training and started again."""
    out = tmp_path_factory.mktemp("demo") / "run"
    with pytest.MonkeyPatch.context() as patch:
        trained = []
        run_stage = pipeline.run_stage

        def interrupt(recipe):
            if len(trained) == 2:
                raise StoppedError
            trained.append(recipe.stage)
            return run_stage(recipe)

        patch.setattr(pipeline, "run_stage", interrupt)
        with pytest.raises(StoppedError):
            main(["demo", "--quick", "--out", str(out)])
    before = stamps(out)
    assert main(["demo", "--quick", "--out", str(out)]) == 0
    return out, before


@pytest.fixture(scope="module")
def results(run):
    return json.loads((run[0] / "results.json").read_text())


@pytest.mark.slow
def test_stages_that_were_done_are_not_done_again(run):
    out, before = run
    assert list(before) == ["pretrained/language/result.json", "pretrained/clip/result.json",
                            "pretrain/final/result.json", "prefinetune/final/result.json"]  # fmt: skip
    after = stamps(out)
    assert len(after) == len(PARTS) + len(STAGES) + 2
    assert {name: after[name] for name in before} == before
    assert main(["demo", "--quick", "--out", str(out)]) == 0
    assert stamps(out) == after


@pytest.mark.slow
def test_results_tell_of_every_stage(results):
    assert [stage["name"] for stage in results["stages"]] == [*PARTS, *STAGES]
    for stage in (*results["stages"], results["control"], results["without_aux"]):
        assert set(stage) == set(Outcome._fields)
        assert stage["steps"] > 0
        assert stage["loss"] > 0
        assert stage["seconds"] > 0
        assert (stage["accuracy"] is None) == (stage["name"] in PARTS)
    assert 3 * QUICK.test_scenes < results["questions"] < 4 * QUICK.test_scenes
    for by_kind in (*results["accuracy_by_kind"].values(), results["blank_pictures"]["by_kind"]):
        assert set(by_kind) == set(scenes.KINDS)
    assert results["control"]["name"] == DENSE


@pytest.mark.slow
@pytest.mark.parametrize("key", ["expert_load", "expert_load_before", "expert_load_without_aux"])
def test_results_tell_the_load_of_every_layer_and_scale(results, key):
    load = results[key]
    assert list(load["vision"]) == [str(layer) for layer in range(QUICK.vision_layers - 1)]
    for shares in (load["connector"], *(shares for layer in load["vision"].values() for shares in layer.values())):
        assert len(shares) == QUICK.experts
        assert sum(shares) == pytest.approx(1)
    assert all(set(layer) == {"1", "2"} for layer in load["vision"].values())


@pytest.mark.slow
def test_loads_are_those_of_each_scale_alone(run):
    out, _ = run
    pictures = sorted({question.picture for question in dataset.read_test(out / "data")})
    model = CuMoPipeline.from_pretrained(out / "instruct" / "final")
    load = evaluate.expert_load(model, pictures)
    pixels = model.processor(images=pictures, return_tensors="pt")["pixel_values"]
    for scale in QUICK.scales:
        tiles = split_tiles(resize(pixels, scale * scenes.SIZE), scale)
        with torch.inference_mode():
            _, routings = model.model.vision_tower.encode(tiles)
        for layer, routing in enumerate(routings):
            shares = [(routing.expert_TK == expert).float().mean().item() for expert in range(QUICK.experts)]
            assert load["vision"][str(layer)][str(scale)] == pytest.approx(shares, abs=1e-4), (layer, scale)


@pytest.mark.slow
def test_only_the_connector_trains_first_and_experts_come_last(run):
    out, _ = run
    assembled, connected, tuned, last, dense = (
        CuMoPipeline.from_pretrained(out / name).model
        for name in ("assembled", "pretrain/final", "prefinetune/final", "instruct/final", f"{DENSE}/final")
    )
    for name, tensor in assembled.state_dict().items():
        frozen = torch.equal(tensor, connected.state_dict()[name])
        assert frozen != name.startswith("connector."), name
    assert not torch.equal(
        connected.language_model.model.layers[0].mlp.up_proj.weight,
        tuned.language_model.model.layers[0].mlp.up_proj.weight,
    )
    assert not tuned.config.vision_config.is_moe
    assert not dense.config.vision_config.is_moe
    assert last.config.vision_config.num_experts == last.config.connector_num_experts == QUICK.experts


@pytest.mark.slow
def test_controls_differ_from_the_last_stage_in_what_they_control_alone(run):
    out, _ = run
    demo = Demo(out, QUICK)
    last, dense, without_aux = (demo.recipe(name).to_dict() for name in ("instruct", DENSE, WITHOUT_AUX))

    def changed(other):
        return {key for key in last if last[key] != other[key]} - {"output_dir"}

    assert changed(dense) == {"upcycle", "aux"}
    assert changed(without_aux) == {"aux"}
    assert without_aux["aux"] == {"mode": None, "balance": 0.0, "z": 0.0}


@pytest.mark.slow
def test_the_report_has_all_its_parts_and_needs_nothing_else(run, results):
    page = (run[0] / "report.html").read_text()
    assert re.findall(r"<h2>(.*?)</h2>", page) == list(SECTIONS)
    assert page.count("<svg") == 5
    assert page.count("<tr") == 1 + len(results["stages"]) + 3
    assert "$" not in re.sub(r"(?s)<svg.*?</svg>", "", page)
    assert not re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?!data:|#)(?:\w+:|//|[\w.]+/)""", page)
    assert page.count('<figure><img src="data:image/png;base64,') > 0
    for section in re.findall(r"(?s)<section>(.*?)</section>", page):
        assert len(section) > 200 or "None." in section


@pytest.mark.slow
def test_checkpoints_answer_and_the_test_uses_them(run):
    out, _ = run
    questions = dataset.read_test(out / "data")
    found = evaluate.answer(CuMoPipeline.from_pretrained(out / "instruct" / "final"), questions, "again")
    assert found.texts == json.loads((out / "answers" / "instruct.json").read_text())["texts"]
    with Image.open(questions[0].picture) as image:
        assert image.size == (scenes.SIZE, scenes.SIZE)


@pytest.mark.slow
def test_questions_are_asked_as_they_were_trained_on(run):
    out, _ = run
    model = CuMoPipeline.from_pretrained(out / "instruct" / "final")
    row = json.loads((out / "data" / dataset.QUESTIONS).read_text())[0]
    trained = SampleEncoder(model.processor, TEMPLATE)(parse_row(row))
    prompt = trained.input_ids[: next(i for i, label in enumerate(trained.labels) if label != IGNORE_INDEX)]
    question = row["conversations"][1]["value"].removeprefix("<image>\n")
    content = [{"type": "image", "image": out / "data" / row["image"]}, {"type": "text", "text": question}]
    asked = model.prepare([{"role": "user", "content": content}], GenerationOptions())
    assert list(asked.prompt_ids) == prompt


@pytest.mark.slow
def test_another_run_is_refused_and_left_as_it_is(run, capsys):
    out, _ = run
    before = {path: os.stat(path).st_mtime_ns for path in out.rglob("*")}
    assert main(["demo", "--quick", "--seed", "1", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "differs in ['seed']" in error
    assert str(out) in error
    assert {path: os.stat(path).st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize("content", ["a folder with a file of somebody", "a run with a strange file", "a file"])
def test_what_is_no_run_is_refused_and_left_as_it_is(content, tmp_path, capsys):
    out = tmp_path / "out"
    if content == "a file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
        if content.startswith("a run"):
            (out / "demo.json").write_text(json.dumps(QUICK.to_dict()))
    before = sorted(tmp_path.rglob("*"))
    assert main(["demo", "--quick", "--out", str(out)]) == 2
    assert "--out: expected" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    assert (out if out.is_file() else out / "thesis.txt").read_text() == "mine"


def test_damaged_settings_are_refused(tmp_path, capsys):
    (tmp_path / "demo.json").write_text("{")
    assert main(["demo", "--quick", "--out", str(tmp_path)]) == 2
    assert "--out: expected the settings of an earlier run" in capsys.readouterr().err


def test_loads_of_scales_weigh_as_many_tokens_as_they_have():
    load = {"vision": {"0": {"1": [1.0, 0.0], "2": [0.0, 1.0]}}, "connector": [0.5, 0.5]}
    assert evaluate.loads_by_layer(load) == {"block 1": [0.2, 0.8], "connector": [0.5, 0.5]}
