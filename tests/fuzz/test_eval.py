# SPDX-License-Identifier: Apache-2.0
"""Files of benchmarks, answers and recorded replies of any bytes: figures, or a sentence that names the file."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import tempfile
from pathlib import Path
from random import Random

import pytest
from hypothesis import given

from cumo.eval import command
from cumo.eval.judges import Recorder
from cumo.eval.tasks import PUBLISHED_TASKS, TASKS
from tests.eval.miniature import ANSWERS, build
from tests.eval.scripted import ScriptedModel, scripted_judge
from tests.fuzz.mutate import RANDOM, as_json, cases, damaged, mutated

JUDGED = [task for task in PUBLISHED_TASKS if TASKS[task.name].judge_settings is not None]
TABLES = (".json", ".jsonl", ".tsv", ".txt", ".csv", ".parquet", "")


class Fixed(ScriptedModel):
    """Answers anything."""

    def answer(self, questions, max_new_tokens):
        """The scripted answer, A to questions that are new."""
        assert max_new_tokens in (128, 1024)
        return [ANSWERS.get(question.id, "A") for question in questions]


def make(folder: Path) -> tuple[Path, Path]:
    """Miniature benchmarks, and the replies of their judge."""
    data = build(folder / "data")
    replies = folder / "replies.jsonl"
    for kind in JUDGED:
        task = kind(data, judge=Recorder(replies, scripted_judge))
        questions = task.questions()
        task.score(questions, [ANSWERS[question.id] for question in questions])
    return data, replies


_MADE: list[tuple[Path, Path]] = []


@pytest.fixture(scope="session")
def benchmarks(tmp_path_factory):
    """Made once."""
    return make(tmp_path_factory.mktemp("fuzzed"))


def _spoil(path: Path, random: Random) -> None:
    raw = path.read_bytes()
    kind = random.randrange(5)
    if kind == 0 or path.suffix not in (".json", ".jsonl"):
        path.write_bytes(damaged(raw, random))
        return
    if kind == 1:
        path.unlink()
        if random.randrange(2):
            path.mkdir()
        return
    try:
        values = json.loads(raw)
        path.write_bytes(as_json(mutated(values, random), random))
    except ValueError:
        rows = mutated([json.loads(line) for line in raw.splitlines() if line.strip()], random)
        rows = rows if isinstance(rows, list) else [rows]
        path.write_bytes(b"\n".join(as_json(row, random, True) for row in rows))


def run(data: Path, output: Path, name: str, replies: Path) -> None:
    """`cumo eval` of one benchmark."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    words = ["--task", name, "--data", data, "--model", "scripted", "--output", output, "--batch-size", 2]
    if TASKS[name].judge_settings is not None:
        words += ["--judge-replies", replies]
    command.run(parser.parse_args([str(word) for word in words]), Fixed())


def check_benchmark(random: Random, made: tuple[Path, Path] | None = None) -> None:
    """One file of a benchmark, of its answers or of its judge is spoilt."""
    if made is None:
        if not _MADE:
            _MADE.append(make(Path(tempfile.mkdtemp())))
        made = _MADE[0]
    name = random.choice([*TASKS])
    with tempfile.TemporaryDirectory() as folder:
        data, output, replies = Path(folder) / "data", Path(folder) / "out", Path(folder) / "replies.jsonl"
        (source,) = {path for path in (made[0] / TASKS[name].folder,) if path.is_dir()} or {made[0]}
        shutil.copytree(source, data)
        shutil.copyfile(made[1], replies)
        what = random.randrange(4)
        if what == 0:
            with contextlib.suppress(ValueError, OSError):
                run(data, output, name, replies)
            files = [path for path in (output / name).glob("*") if path.suffix in (".json", ".jsonl")]
            (output / "results.json").unlink(missing_ok=True)
        elif what == 1 and TASKS[name].judge_settings is not None:
            files = [replies]
        else:
            files = [path for path in data.rglob("*") if path.is_file() and path.suffix in TABLES]
        if not files:
            return
        _spoil(sorted(files)[random.randrange(len(files))], random)
        try:
            run(data, output, name, replies)
        except (ValueError, OSError) as error:
            assert folder in str(error), repr(error)[:500]
            assert len(str(error)) < 3000
            assert not (output / "results.json").exists()


@cases()
@given(random=RANDOM)
def test_benchmarks(benchmarks, random):
    check_benchmark(random, benchmarks)


TRAPS = [
    ("out/pope/header.json", "[]", "expected an object, got"),
    ("out/pope/header.json", "[" * 20_000, "expected JSON"),
    ("out/pope/answers.0-of-1.jsonl", '{"id": [1], "text": "yes"}\n', "line 1: expected the id of a question"),
    ("out/pope/answers.0-of-1.jsonl", "[" * 20_000 + "\n{}\n", "line 1: expected JSON"),
    ("out/pope/answers.0-of-1.jsonl", '{"id": "' + "y" * 100_000 + '"}\n', "line 1: expected the id of a question"),
    ("data/textvqa/TextVQA_0.5.1_val.json", '{"data": 3}', "data: expected a list, got 3"),
    ("data/scienceqa/pid_splits.json", '{"test": [[1]]}', "expected ids of problems.json"),
    ("data/vqav2/v2_mscoco_val2014_annotations.json", None, "answers: expected objects, got"),
    ("data/llava-bench-in-the-wild/context.jsonl", {"caption": [3]}, "caption: expected text, got [3]"),
    ("data/mathvista/data/testmini.json", {"metadata": 3}, "metadata: expected another type, got 3"),
    ("data/mathvista/data/testmini.json", {"metadata": {"skills": 3}}, "expected a list of skills, got"),
    ("data/mathvista/data/testmini.json", {"choices": 3}, "choices: expected another type, got 3"),
    ("out/pope/answers.0-of-1.jsonl", '{"id": "x", "text": "\\ud800"}\n', "line 1: expected JSON"),
    ("data/mathvista/data/testmini.json", {"query": "\ud800"}, "expected JSON, got"),
    ("data/MME/MME_Benchmark_release_version/OCR/1.txt", "\udcff", "expected UTF-8 text"),
]


@pytest.mark.parametrize(("file", "content", "message"), TRAPS, ids=range(len(TRAPS)))
def test_files_that_are_none(benchmarks, tmp_path, file, content, message):
    shutil.copytree(benchmarks[0], tmp_path / "data")
    kinds = {"textvqa": "textvqa", "scienceqa": "scienceqa", "vqav2": "vqav2_val", "MME": "mme"}
    kinds |= {"llava-bench-in-the-wild": "llava_wild", "mathvista": "mathvista"}
    name = next((kinds[part] for part in Path(file).parts if part in kinds), "pope")
    run(tmp_path / "data", tmp_path / "out", name, benchmarks[1])
    (tmp_path / "out" / "results.json").unlink()
    path = tmp_path / file
    if content is None:
        annotations = json.loads(path.read_text())
        annotations["annotations"][0]["answers"] = [None] * 10
        content = json.dumps(annotations)
    assert path.exists()
    if isinstance(content, dict):  # of its first row
        raw = path.read_text()
        values = [json.loads(line) for line in raw.splitlines()] if path.suffix == ".jsonl" else json.loads(raw)
        first = values[0] if isinstance(values, list) else next(iter(values.values()))
        first.update(content)
        content = "\n".join(map(json.dumps, values)) if path.suffix == ".jsonl" else json.dumps(values)
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        run(tmp_path / "data", tmp_path / "out", name, benchmarks[1])
    assert path.name in str(raised.value) and len(str(raised.value)) < 3000
    assert not (tmp_path / "out" / "results.json").exists()
