# SPDX-License-Identifier: Apache-2.0
"""Writes commands.md from the parsers of the commands: `python docs/commands.py`. A test keeps the two in step."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path(__file__).with_name("commands.md")
# What runs as `python -m NAME`.
MODULES = (
    "cumo_kernels.inspect",
    "cumo_kernels.tune",
    "benchmarks.run",
    "benchmarks.end_to_end",
    "benchmarks.profile",
    "benchmarks.serving",
    "benchmarks.compile",
    "benchmarks.plots",
)
HEADER = """\
# Commands

Written by `python docs/commands.py` from the parsers of the commands; `--help` of each says the same.
[training.md](training.md), [serving.md](serving.md), [evaluation.md](evaluation.md), [demo.md](demo.md) and
[performance.md](performance.md) say what they are for; the limits of the server are explained
[there](serving.md#limits).
"""


class _ParsedError(Exception):
    """Carries the parser that was about to parse."""


def parser_of_module(name: str) -> argparse.ArgumentParser:
    """The parser of `python -m NAME`: that which its `main` comes to first."""

    def instead(self: argparse.ArgumentParser, *_: object) -> None:
        raise _ParsedError(self)

    main = importlib.import_module(name).main
    with mock.patch.object(argparse.ArgumentParser, "parse_args", instead), mock.patch.object(sys, "argv", [name]):
        try:
            main()
        except _ParsedError as found:
            parser: argparse.ArgumentParser = found.args[0]
            parser.prog = f"python -m {name}"
            return parser
    raise ValueError(f"{name}: expected a main that parses arguments")


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Every command by what is typed: `cumo train`, `python -m benchmarks.run`, ..."""
    from cumo.cli import COMMANDS, parser_of

    ours = {f"cumo {name}": parser_of(name) for name in sorted(COMMANDS)}
    return ours | {f"python -m {name}": parser_of_module(name) for name in MODULES}


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _values(action: argparse.Action) -> str:
    """What stands behind an option: nothing, a name or the choices."""
    if action.nargs == 0:
        return ""
    many = " ..." if action.nargs in ("+", "*") else ""
    if action.choices is not None:
        return ""  # they stand in the text
    return f"{action.metavar or action.dest.upper()}{many}"


def _code(values: Iterable[object]) -> str:
    return ", ".join(f"`{value}`" for value in values)


def _default(action: argparse.Action) -> list[str]:
    """Values of the default; none where an option without one says what it does then."""
    value = action.default
    if isinstance(value, (list, tuple)):
        return [str(each) for each in value]
    if value is None or isinstance(value, bool) or value in ("", argparse.SUPPRESS):
        return []
    return [str(value).replace(f"{ROOT}/", "")]


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """Help without the default, which has a column of its own."""
    if not action.help:
        return ""
    text = parser.formatter_class(prog=parser.prog)._expand_help(action)
    for told in (" (default: {})", "; default: {}", "default: {}", "{}"):
        if _default(action) and text.endswith(told.format(action.default)):
            return text.removesuffix(told.format(action.default))
    return text


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    name = ", ".join(action.option_strings) or action.metavar or action.dest
    shown = f"`{name} {_values(action)}`" if action.option_strings and _values(action) else f"`{name}`"
    text = [_help(parser, action)]
    if action.choices is not None and not all(choice in text[0] for choice in action.choices):
        text.append("one of " + _code(action.choices))
    if action.required and action.option_strings:
        text.append("has to be given")
    return f"| {_cell(shown)} | {_cell(_code(_default(action)))} | {_cell('; '.join(filter(None, text)))} |"


def section(command: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    """Lines of one command."""
    yield f"## {command}\n"
    yield f"{(parser.description or '').strip()}\n"
    yield "| argument | default | |\n|---|---|---|"
    for action in parser._actions:
        if not isinstance(action, argparse._HelpAction):
            yield _row(parser, action)
    yield ""


def page() -> str:
    """All of commands.md."""
    return "\n".join([HEADER, *(line for name, parser in parsers().items() for line in section(name, parser))])


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(page())
