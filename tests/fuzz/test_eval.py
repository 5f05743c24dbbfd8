# SPDX-License-Identifier: Apache-2.0
"""Files of benchmarks, answers and recorded replies of any bytes: figures, or a sentence that names the file."""

from __future__ import annotations

import argparse
import contextlib
import json
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
