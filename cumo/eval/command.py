# SPDX-License-Identifier: Apache-2.0
"""Evaluate a model on the published benchmarks.

Each benchmark lies in a folder of its own below `--data`, in the layout of the published scripts (docs/evaluation.md).
Answers are kept batch by batch below `--output`: the same command goes on where a run stopped. Under `torchrun` the
questions are shared among the processes.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

from cumo.eval import report
from cumo.eval.distributed import joined
from cumo.eval.driver import evaluate
from cumo.eval.judges import KEY_VARIABLE, EndpointJudge, Judge, Recorder
from cumo.eval.questions import Model
from cumo.eval.tasks import PUBLISHED_TASKS, TASKS, Task

_JUDGED = [name for name, task in TASKS.items() if task.judge_settings is not None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `cumo eval`."""
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--task", nargs="+", choices=TASKS, metavar="NAME", help=f"one or more of {', '.join(TASKS)}")
    chosen.add_argument("--all", action="store_true", help="all but vqav2_val")
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder for each benchmark")
    parser.add_argument("--model", required=True, help="folder of a checkpoint, or a model of the hub")
    parser.add_argument("--output", type=Path, default=Path("eval_results"), help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=8, help="questions a batch; default: %(default)s")
    parser.add_argument("--dtype", default="auto", help="data type of the weights; default: the checkpoint's")
    parser.add_argument("--device", help="default: a GPU if there is one, of several the one of this process")
    parser.add_argument(
        "--published-quirks",
        action="store_true",
        help="repeat what the published evaluation gets wrong, where figures depend on it",
    )
    judged = parser.add_argument_group(f"judge, for {', '.join(_JUDGED)}")
    judged.add_argument("--judge-url", help="OpenAI-compatible endpoint, such as https://api.openai.com/v1")
    judged.add_argument("--judge-model", help=f"model of the endpoint; its key is read from {KEY_VARIABLE}")
    judged.add_argument(
        "--judge-replies", type=Path, help="recorded replies, a JSON object with prompt and reply a line"
    )
    judged.add_argument("--judge-runs", type=int, default=1, help="runs of mmvet and llava_wild; default: %(default)s")


def _judge(arguments: argparse.Namespace, task: type[Task]) -> Judge | None:
    """The judge of a benchmark; every reply of an endpoint is kept beside the benchmark's answers."""
    if task.judge_settings is None:
        return None
    if arguments.judge_replies is not None:
        return Recorder(arguments.judge_replies)
    if arguments.judge_url is None:
        return None
    folder: Path = arguments.output / task.name
    folder.mkdir(parents=True, exist_ok=True)
    file = f"judge.{re.sub(r'[^A-Za-z0-9.-]', '_', arguments.judge_model)}.jsonl"
    return Recorder(folder / file, EndpointJudge(arguments.judge_url, arguments.judge_model, task.judge_settings))


def _check(arguments: argparse.Namespace) -> None:
    if arguments.judge_replies is not None and arguments.judge_url is not None:
        raise ValueError("--judge-replies, --judge-url: expected one of them, got both")
    if (arguments.judge_url is None) != (arguments.judge_model is None):
        raise ValueError("--judge-url, --judge-model: expected both or none of them, got one")
    if arguments.task is not None and len(set(arguments.task)) < len(arguments.task):
        raise ValueError(f"--task: expected each benchmark once, got {arguments.task}")


def run(arguments: argparse.Namespace, model: Model | None = None) -> None:
    """Carry out `cumo eval`.

    Args:
        arguments: of `add_arguments`.
        model: asked in place of the one that `--model` names.

    Raises:
        ValueError: arguments, files of a benchmark or earlier answers are not what they should be.
        OSError: a file cannot be read or written, or the judge cannot be reached.
    """
    _check(arguments)
    kinds: Sequence[type[Task]] = PUBLISHED_TASKS if arguments.all else [TASKS[name] for name in arguments.task]
    tasks = [
        kind(
            arguments.data,
            published_quirks=arguments.published_quirks,
            judge=_judge(arguments, kind),
            judge_runs=arguments.judge_runs,
        )
        for kind in kinds
    ]
    with joined() as worker:
        model = model or _pipeline(arguments)
        results = evaluate(model, tasks, arguments.output, batch_size=arguments.batch_size, worker=worker)
        if worker.rank == 0:
            about = {
                "model": {"name": model.name, "fingerprint": model.fingerprint},
                "published_quirks": arguments.published_quirks,
                "judge": str(arguments.judge_replies or arguments.judge_model or "") or None,
                "judge_runs": arguments.judge_runs,
            }
            print(report.write(results, about, arguments.output))


def _pipeline(arguments: argparse.Namespace) -> Model:
    """The model that `--model` names, on this process's own device."""
    import torch

    from cumo.eval.model import PipelineModel

    device = arguments.device
    if device is None:
        gpus, processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if 0 < gpus < processes:
            raise ValueError(f"--device: expected a GPU for each of {processes} processes of this machine, got {gpus}")
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if gpus else "cpu"
    return PipelineModel(arguments.model, dtype=arguments.dtype, device=device)
