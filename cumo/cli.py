# SPDX-License-Identifier: Apache-2.0
"""The command line, `cumo COMMAND ...`. A command's module is imported once it is chosen.

Such a module has `add_arguments(parser)` and `run(arguments)`.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from cumo import __version__


class Command(NamedTuple):
    """One command of `cumo`."""

    module: str
    help: str
    extra: str = "transformers"  # extra of this package that the command needs


COMMANDS = {
    "chat": Command("cumo.inference.chat", "talk with a model about pictures, in the terminal"),
    "convert": Command("cumo.checkpoints.convert", "convert a checkpoint between the layouts"),
    "train": Command("cumo.train.command", "one stage of training, from a recipe; goes on where it stopped", "train"),
    "serve": Command("cumo.serve.command", "serve a model: OpenAI's chat API, and a page to try it", "serve"),
    "demo": Command(
        "cumo.demo.command", "the whole pipeline in minutes: data, all stages of training, a report", "demo"
    ),
    "eval": Command("cumo.eval.command", "evaluate a model on the published benchmarks"),
    "export-vllm": Command("cumo.integrations.vllm", "a folder that vLLM serves through its Transformers backend"),
    "upcycle": Command("cumo.checkpoints.upcycle", "a dense checkpoint to one with experts"),
}


def _overview() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join(f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items())


def parser_of(name: str) -> argparse.ArgumentParser:
    """Return the parser of a command.

    Args:
        name: a key of `COMMANDS`.
    """
    module = importlib.import_module(COMMANDS[name].module)
    parser = argparse.ArgumentParser(
        prog=f"cumo {name}", description=module.__doc__ and module.__doc__.split("\n\n")[0]
    )
    module.add_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="cumo",
        description="CuMo: a multimodal LLM with co-upcycled Mixture-of-Experts.",
        epilog=f"commands:\n{_overview()}\n\n`cumo COMMAND --help` says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="see below")
    name = parser.parse_args(argv[:1] or ["--help"]).command
    try:
        arguments = parser_of(name).parse_intermixed_args(argv[1:])  # options may stand between key=value
        importlib.import_module(COMMANDS[name].module).run(arguments)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "cumo":
            raise
        extra = COMMANDS[name].extra
        hint = f"the extra {extra!r} brings it: pip install '.[{extra}]' in the sources of cumo"
        print(f"cumo {name}: error: {error.name} is not installed; {hint}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"cumo {name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
