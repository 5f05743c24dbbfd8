# SPDX-License-Identifier: Apache-2.0
"""Train a stage from a recipe: a YAML file, or one that comes with the package (see --list).

The same command goes on where a run stopped. Under `torchrun`, `torchrun --nproc-per-node 8 -m cumo train ...`, it
trains on several GPUs and machines. docs/training.md explains recipes.
"""

from __future__ import annotations

import argparse
import logging
import os

from cumo.train.files import dump, load_recipe, shipped
from cumo.train.recipe import Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `cumo train`."""
    parser.add_argument("recipe", nargs="?", help="YAML file, or the name of a recipe of the package")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as optimizer.lr=1e-5")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check-data", action="store_true", help="read all data, report every fault, train nothing")
    what.add_argument("--print", action="store_true", help="show the recipe with all its defaults, train nothing")
    what.add_argument("--list", action="store_true", help="name the recipes of the package")


def run(arguments: argparse.Namespace) -> None:
    """Run `cumo train`.

    Raises:
        ValueError: the recipe or its data are invalid.
        OSError: a file cannot be read or written.
    """
    if arguments.list:
        print("\n".join(shipped()))
        return
    if arguments.recipe is None:
        raise ValueError("recipe: expected a YAML file or a name of --list, got none")
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.print:
        print(dump(recipe), end="")
    elif arguments.check_data:
        _check(recipe)
    else:
        _train(recipe)


def _check(recipe: Recipe) -> None:
    from cumo.train.stage import check_recipe

    report = check_recipe(recipe)
    if report.faults:
        raise ValueError(f"data.path: expected data without faults, got\n{report}")
    print(report)


def _train(recipe: Recipe) -> None:
    from cumo.train.sharding import leave_processes
    from cumo.train.stage import run_stage

    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(levelname)s %(message)s")
    result = run_stage(recipe)
    if first:
        print(f"{result.folder}: {result.steps} steps in {result.seconds:.0f} s, loss {result.loss:.4f}")
    leave_processes()
