# SPDX-License-Identifier: Apache-2.0
"""`cumo eval` on every benchmark in miniature: the exact table, also after a kill and by two processes."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cumo.cli import main
from cumo.eval import command
from cumo.eval.report import PAPER
from cumo.eval.tasks import PUBLISHED_TASKS, TASKS
from tests.eval.miniature import EXPECTED
from tests.eval.scripted import ScriptedModel

ROOT = Path(__file__).resolve().parents[2]


def arguments_of(*words):
    """The parsed command line."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def run(miniature, output, *words, model=None):
    """Run the command in this process; what it wrote, and the model that was asked."""
    model = model or ScriptedModel()
    command.run(arguments_of("--data", miniature, "--model", "scripted", "--output", output, *words), model)
    return json.loads((output / "results.json").read_text()), model


def figures(results):
    """The figure of each benchmark."""
    return {name: entry["value"] for name, entry in results["results"].items()}


def expected(names):
    """What must come out."""
    return {name: pytest.approx(EXPECTED[name]) if EXPECTED[name] is not None else None for name in names}


def test_all_benchmarks_give_the_exact_table(miniature, replies, tmp_path, capsys):
    results, model = run(miniature, tmp_path, "--all", "--judge-replies", replies, "--batch-size", 3)
    names = [task.name for task in PUBLISHED_TASKS]
    assert figures(results) == expected(names)
    assert results["model"]["name"] == "scripted model" and results["versions"]["torch"]
    assert len(model.asked) == len(set(model.asked))
    table = capsys.readouterr().out
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in table.splitlines()}
    for task in PUBLISHED_TASKS:
        row, value = rows[task.title], EXPECTED[task.name]
        assert row[1] == ("–" if value is None else f"{value:.1f}")
        for column, published in zip(row[2:4], PAPER.values(), strict=True):
            assert column == (f"{published[task.name]:.1f}" if task.name in published else "–")
    assert table.strip() in (tmp_path / "results.md").read_text()


def test_the_validation_split_of_vqav2_is_scored_offline(miniature, tmp_path):
    results, _ = run(miniature, tmp_path, "--task", "vqav2_val")
    assert figures(results) == expected(["vqav2_val"])


def test_without_a_judge_what_needs_one_has_no_figure(miniature, tmp_path):
    results, _ = run(miniature, tmp_path, "--task", "mmvet", "llava_wild", "mathvista")
    assert figures(results) == {"mmvet": None, "llava_wild": None, "mathvista": 50.0}
    assert all("judge" in entry["note"] for entry in results["results"].values())


def program(*words, processes=1, **options):
    """The scripted evaluation as a program of its own."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [*launcher, "-m", "tests.eval.scripted", *map(str, words)]
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, **options)


def test_killed_half_way_and_resumed_the_table_is_the_same(replies, tmp_path):
    words = (tmp_path / "data", "--all", "--output", tmp_path / "out", "--judge-replies", replies, "--batch-size", 4)
    killed = program(*words, "--kill-after", 7)
    assert killed.returncode == -signal.SIGKILL
    kept = sum(len(path.read_text().splitlines()) for path in (tmp_path / "out").rglob("answers.*.jsonl"))
    assert kept > 0 and not (tmp_path / "out" / "results.json").exists()
    resumed = program(*words)
    assert resumed.returncode == 0, resumed.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert figures(results) == expected(task.name for task in PUBLISHED_TASKS)
    rows = sum(len(path.read_text().splitlines()) for path in (tmp_path / "out").rglob("answers.*.jsonl"))
    again = program(*words)
    assert again.returncode == 0
    assert rows == sum(len(path.read_text().splitlines()) for path in (tmp_path / "out").rglob("answers.*.jsonl"))


@pytest.mark.slow
def test_two_processes_give_the_same_table(replies, tmp_path):
    words = (tmp_path / "data", "--all", "--output", tmp_path / "out", "--judge-replies", replies, "--batch-size", 2)
    shared = program(*words, processes=2)
    assert shared.returncode == 0, shared.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert figures(results) == expected(task.name for task in PUBLISHED_TASKS)
    files = {path.name for path in (tmp_path / "out").rglob("answers.*.jsonl")}
    assert files == {"answers.0-of-2.jsonl", "answers.1-of-2.jsonl"}
    assert shared.stdout.count("| SQA-I |") == 1, "the table is printed once"


def test_answers_of_another_model_are_not_taken_up(miniature, tmp_path):
    run(miniature, tmp_path, "--task", "gqa")
    with pytest.raises(ValueError, match=r"header\.json: model: expected 'other', got 'scripted'.*choose another out"):
        run(miniature, tmp_path, "--task", "gqa", model=ScriptedModel(fingerprint="other"))


def test_answers_to_other_questions_are_not_taken_up(miniature, tmp_path):
    data = shutil.copytree(miniature, tmp_path / "data")
    run(data, tmp_path / "out", "--task", "gqa")
    path = data / "gqa" / "llava_gqa_testdev_balanced.jsonl"
    path.write_text(path.read_text().replace("Question 2011?", "Question 2011 changed?"))
    with pytest.raises(ValueError, match=r"header\.json: questions: expected"):
        run(data, tmp_path / "out", "--task", "gqa")


def edited(answers, change):
    """Change the rows of an answer file."""
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    change(rows)
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.append(rows[0]), r"line 5: id: expected a question once, got '2011', which .*line 1 has"),
        (lambda rows: rows[1].update(id="999"), r"line 2: expected the id of a question and a text"),
        (lambda rows: rows[1].pop("text"), r"line 2: expected the id of a question and a text"),
        (lambda rows: rows[2].update(prompt="another"), r"line 3: prompt: expected that of question 2013"),
    ],
    ids=["twice", "unknown", "no text", "prompt"],
)
def test_answer_files_that_do_not_fit(change, message, miniature, tmp_path):
    run(miniature, tmp_path, "--task", "gqa", "--batch-size", 4)
    edited(tmp_path / "gqa" / "answers.0-of-1.jsonl", change)
    with pytest.raises(ValueError, match=message):
        run(miniature, tmp_path, "--task", "gqa")


def test_a_row_that_was_cut_off_is_asked_again(miniature, tmp_path):
    run(miniature, tmp_path, "--task", "gqa")
    path = tmp_path / "gqa" / "answers.0-of-1.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    results, model = run(miniature, tmp_path, "--task", "gqa")
    assert model.asked == ["2014"]
    assert figures(results) == expected(["gqa"])


def break_file(name):
    """A fault of a benchmark's files."""

    def change(folder):
        (folder / name).unlink()

    return change


def replaced(name, old, new):
    """Another fault: a text within a file."""

    def change(folder):
        path = folder / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return change


FAULTS = {
    "gqa: no questions": ("gqa", break_file("llava_gqa_testdev_balanced.jsonl"), r"llava_gqa_testdev_balanced\.jsonl"),
    "gqa: no answers": ("gqa", break_file("data/testdev_balanced_questions.json"), r"testdev_balanced_questions\.json"),
    "gqa: no picture": ("gqa", break_file("data/images/n2012.jpg"), r"n2012\.jpg"),
    "gqa: an id twice": (
        "gqa",
        replaced("llava_gqa_testdev_balanced.jsonl", '"question_id": "2012"', '"question_id": "2011"'),
        r"question_id.*2011",
    ),
    "gqa: an unknown id": (
        "gqa",
        replaced("llava_gqa_testdev_balanced.jsonl", '"question_id": "2012"', '"question_id": "77"'),
        "77",
    ),
    "gqa: a row without a picture": (
        "gqa",
        replaced("llava_gqa_testdev_balanced.jsonl", '"image": "n2013.jpg", ', ""),
        r"line 3.*image",
    ),
    "gqa: a broken row": ("gqa", replaced("llava_gqa_testdev_balanced.jsonl", '"2013"', '"2013'), "line 3"),
    "pope: a label missing": (
        "pope",
        replaced("coco/coco_pope_popular.json", '"label": "yes"', '"label": "perhaps"'),
        r"coco_pope_popular\.json",
    ),
    "scienceqa: no split": ("scienceqa", break_file("pid_splits.json"), r"pid_splits\.json"),
    "mmbench: no table": ("mmbench", break_file("mmbench_dev_20230712.tsv"), r"mmbench_dev_20230712\.tsv"),
    "textvqa: answers of no question": (
        "textvqa",
        replaced("TextVQA_0.5.1_val.json", "Which number?", "Which other?"),
        r"(?i)which number",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_do_not_fit_are_named_before_a_model_is_asked(fault, miniature, tmp_path):
    task, change, message = FAULTS[fault]
    data = shutil.copytree(miniature, tmp_path / "data")
    change(data / TASKS[task].folder)
    model = ScriptedModel()
    with pytest.raises(ValueError, match=message):
        run(data, tmp_path / "out", "--task", task, model=model)
    assert model.asked == []


def test_pictures_that_cannot_be_decoded_are_named(miniature, tmp_path):
    data = shutil.copytree(miniature, tmp_path / "data")
    (data / "gqa" / "data" / "images" / "n2012.jpg").write_text("no picture")
    with pytest.raises(ValueError, match=r"n2012\.jpg: expected a picture, got"):
        run(data, tmp_path / "out", "--task", "gqa")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--task", "gqa", "gqa"), "--task: expected each benchmark once"),
        (("--task", "gqa", "--judge-url", "http://x"), "--judge-url, --judge-model: expected both or none"),
        (("--task", "gqa", "--batch-size", "0"), "batch_size: expected a positive number, got 0"),
        (("--task", "mmvet", "--judge-runs", "0"), "judge_runs: expected a positive number, got 0"),
    ],
)
def test_arguments_that_do_not_fit(words, message, miniature, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(miniature, tmp_path, *words)


def test_the_command_of_the_package_says_what_is_wrong(tmp_path, capsys):
    words = ["eval", "--task", "gqa", "--data", str(tmp_path / "none"), "--model", "m", "--output", str(tmp_path)]
    assert main(words) == 2
    assert "expected the folder of gqa, found none" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_model_answers_every_benchmark(miniature, tmp_path, capsys):
    """A tiny random one; what it says is nonsense, but every format, prompt and picture goes through it."""
    from tests.inference.tiny import save_model

    save_model(tmp_path / "model")
    words = ["--data", str(miniature), "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    assert main(["eval", "--all", *words, "--device", "cpu", "--batch-size", "16"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["results"]) == [task.name for task in PUBLISHED_TASKS]
    unscored = {name for name, entry in results["results"].items() if entry["value"] is None}
    assert unscored == {"mmvet", "vqav2", "llava_wild"}
    assert len(results["model"]["fingerprint"]) == 64
    assert "| MMMU-v |" in capsys.readouterr().out
