# SPDX-License-Identifier: Apache-2.0
"""The whole pipeline in minutes, on any machine: data, all stages of training, controls, a report.

Pictures of handwritten digits and questions on them; a small CLIP and a small language model in place of downloaded
ones; then the stages of CuMo, as `cumo train` runs them. The same command goes on where a run stopped: stages that are
done in --out are not done again, and the one that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import logging
import sys
import time
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `cumo demo`."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        help="folder for results.json, report.html, data and checkpoints: a new one, or one of an interrupted run with "
        "the same options, whose finished stages are not run again; default: %(default)s",
    )
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and order; default: %(default)s")
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of every stage, to see that all works; nothing is learnt"
    )


def run(arguments: argparse.Namespace) -> None:
    """Carry out `cumo demo`.

    Raises:
        ValueError: `--out` holds something else than a run with these options.
        OSError: something cannot be read or written.
        ModuleNotFoundError: a package of the extra `demo` is not installed.
    """
    for package in ("matplotlib", "sklearn"):
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"the demo needs {package}", name=package)
    from cumo.demo import report
    from cumo.demo.pipeline import RESULTS, Demo
    from cumo.demo.settings import FULL, QUICK
    from cumo.demo.training import few_threads

    logging.getLogger("cumo").setLevel(logging.WARNING)
    settings = dataclasses.replace(QUICK if arguments.quick else FULL, seed=arguments.seed)
    began = time.perf_counter()
    demo = Demo(arguments.out, settings)
    with few_threads():
        results = demo.run()
        path = report.write(demo, results)
    print(report.table(results))
    print(f"least load of an expert: {report.least_load(results['expert_load']):.1%}, "
          f"with coefficients of zero {report.least_load(results['expert_load_without_aux']):.1%}")  # fmt: skip
    print(f"{arguments.out / RESULTS} and {path}; {time.perf_counter() - began:.0f} s", file=sys.stderr)
    print(f"try: cumo chat {arguments.out / 'instruct' / 'final'} --image {demo.example()}", file=sys.stderr)
