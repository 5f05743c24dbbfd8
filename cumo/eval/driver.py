# SPDX-License-Identifier: Apache-2.0
"""Asking a model every question of a benchmark, and scoring what it said."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from cumo.eval.answers import AnswerFolder
from cumo.eval.distributed import Worker
from cumo.eval.questions import Model, Question, fingerprint
from cumo.eval.tasks import Scores, Task


@dataclass(frozen=True)
class Result:
    """Scores of a model on a benchmark."""

    task: type[Task]
    scores: Scores


def ask(model: Model, task: Task, questions: Sequence[Question], folder: Path, batch_size: int, worker: Worker) -> None:
    """Answer this process's share of the questions that have no answer yet; each batch is kept as it comes.

    Args:
        model: asked.
        task: of the questions.
        questions: all of them.
        folder: of the answers; see `AnswerFolder`.
        batch_size: questions a batch.
        worker: of this process; all processes call this together.

    Raises:
        ValueError: the folder holds other answers, or the model gives another number of answers than it was asked.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected a positive number, got {batch_size}")
    answers = AnswerFolder(folder, questions)
    header = {
        "task": task.name,
        "model_name": model.name,
        "model": model.fingerprint,
        "questions": fingerprint(questions),
        "max_new_tokens": task.max_new_tokens,
    }
    answers.claim(header, worker)
    given = answers.given()
    # Shares are dealt before what is given is left out: they do not depend on what other processes have just written.
    share = [question for question in questions[worker.rank :: worker.world_size] if question.id not in given]
    with tqdm(total=len(share), desc=task.name, unit="question", disable=worker.rank != 0 or not share) as progress:
        for start in range(0, len(share), batch_size):
            batch = share[start : start + batch_size]
            texts = model.answer(batch, task.max_new_tokens)
            if len(texts) != len(batch):
                raise ValueError(f"model: expected {len(batch)} answers, got {len(texts)}")
            answers.append(batch, [text.strip() for text in texts], worker)
            progress.update(len(batch))
    worker.barrier()


def score(task: Task, questions: Sequence[Question], folder: Path) -> Result:
    """Score the answers of a folder, and write the files for the benchmark's own tools into its `exports`.

    Raises:
        ValueError: an answer is missing, or one too many.
    """
    scores = task.score(questions, AnswerFolder(folder, questions).complete())
    exports = folder / "exports"
    for name, content in scores.exports.items():
        exports.mkdir(exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        (exports / name).write_text(text, encoding="utf-8")
    return Result(type(task), scores)


def evaluate(
    model: Model, tasks: Sequence[Task], output: Path, *, batch_size: int = 1, worker: Worker | None = None
) -> list[Result]:
    """Ask a model every question of the benchmarks, then score them all.

    All files of all benchmarks are read and checked before the model is asked anything.

    Args:
        model: asked.
        tasks: the benchmarks.
        output: gets a folder for each of them.
        batch_size: questions a batch.
        worker: of this process, if there are several.

    Returns:
        Results in the order of the tasks; in the first process only.

    Raises:
        ValueError: files of a benchmark or answers of a folder are not what they should be.
    """
    worker = worker or Worker()
    questions = [task.questions() for task in tasks]
    for task, asked in zip(tasks, questions, strict=True):
        ask(model, task, asked, output / task.name, batch_size, worker)
    if worker.rank != 0:
        return []
    return [score(task, asked, output / task.name) for task, asked in zip(tasks, questions, strict=True)]
