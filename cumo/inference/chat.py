# SPDX-License-Identifier: Apache-2.0
"""Chat with a model in the terminal, about pictures or without.

Ctrl-C stops an answer, or clears the line; Ctrl-D or /exit ends the chat.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from PIL import Image

from cumo.inference.arguments import add_model_arguments, load_pipeline
from cumo.inference.fetch import fetch
from cumo.inference.options import GenerationOptions
from cumo.inference.pipeline import CuMoPipeline
from cumo.models.pictures import read_rgb

HELP = """\
  /image PATH   look at a picture: a file, or an http(s) address, which is fetched only if you give one;
                it goes with your next question, and several of them all do
  /reset        forget the conversation and its pictures
  /help         show this
  /exit         leave; so does Ctrl-D
Anything else is said to the model. Ctrl-C stops its answer."""
MAX_DOWNLOAD = 64 << 20


class Chat:
    """A conversation in the terminal, which grows by turns.

    Args:
        pipeline: the pipeline that answers.
        options: options of generation.
        out: stream that answers and messages are written to.
        system: system prompt; None for that of the chat template.
    """

    def __init__(
        self, pipeline: CuMoPipeline, options: GenerationOptions, out: TextIO, system: str | None = None
    ) -> None:
        self.messages: list[dict[str, Any]] = []
        self._pipeline = pipeline
        self._options = options
        self._out = out
        self._system = system
        self._pictures: list[Image.Image] = []
        self.reset()

    def reset(self) -> None:
        """Forget all messages and pictures."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]
        self._pictures = []

    def show(self, source: str) -> None:
        """Add a picture to the next question.

        Raises:
            ValueError: `source` is not a picture, or could not be fetched.
            OSError: `source` cannot be read.
        """
        picture = open_picture(source)
        self._pictures.append(picture)
        self._say(f"[picture of {picture.width} x {picture.height} pixels: ask something about it]\n")

    def handle(self, line: str) -> bool:
        """Carry out a line of input. Return False if it ends the chat."""
        line = line.strip()
        command, _, argument = line.partition(" ")
        if command == "/exit":
            return False
        if command == "/reset":
            self.reset()
            self._say("[forgotten]\n")
        elif command == "/image" and argument.strip():
            try:
                self.show(argument.strip())
            except OSError as error:
                reason = f"{error.filename}: {error.strerror}" if error.strerror else str(error)
                self._say(f"[no picture: {reason}]\n")
            except ValueError as error:
                self._say(f"[no picture: {error}]\n")
        elif command == "/help":
            self._say(f"{HELP}\n")
        elif command.startswith("/") and command[1:].isalpha():
            self._say(
                f"[{'/image needs a path' if command == '/image' else 'unknown command ' + command}: see /help]\n"
            )
        elif line:
            self._ask(line)
        return True

    def _ask(self, text: str) -> None:
        parts: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in self._pictures]
        question = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
        said: list[str] = []
        try:
            stream = self._pipeline.stream([*self.messages, question], self._options)
        except ValueError as error:
            self._say(f"[not asked: {error}; /reset begins anew]\n")
            return
        except KeyboardInterrupt:
            self._say("[not asked]\n")
            return
        try:
            for piece in stream:
                said.append(piece)
                self._say(printable(piece))
        except KeyboardInterrupt:
            stream.close()  # type: ignore[attr-defined]
            self._say(" [stopped]")
            if not said:
                self._say("\n")
                return  # the question is dropped
        self._say("\n")
        self.messages += [question, {"role": "assistant", "content": "".join(said)}]
        self._pictures = []

    def _say(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


def printable(text: str) -> str:
    """Return the text without control characters, which a terminal would act on."""
    return "".join(character for character in text if character in "\n\t" or character.isprintable())


def open_picture(source: str) -> Image.Image:
    """Return a picture in RGB from a path or an http(s) address.

    Raises:
        ValueError: `source` is not a picture, or could not be fetched.
        OSError: `source` cannot be read.
    """
    if source.startswith(("http://", "https://")):
        # The request comes from a person at this machine, so addresses of the private network are allowed.
        content = fetch(source, max_bytes=MAX_DOWNLOAD, is_allowed=lambda _: True)
        return read_rgb(io.BytesIO(content), source[:200])
    path = Path(os.path.expanduser(source.strip("'\"")))
    return read_rgb(path, f"picture {str(path)!r}")


def lines(stdin: TextIO) -> Iterator[str]:
    """Yield lines of input, with a prompt if the input is a terminal. Ctrl-C clears the line."""
    if not stdin.isatty():
        yield from stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # adds editing and history to `input`
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("  (Ctrl-D or /exit to leave)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `cumo chat`."""
    add_model_arguments(parser)
    parser.add_argument("--image", action="append", default=[], help="picture to begin with: a path or an address")
    parser.add_argument("--system", help="system prompt in place of the template's")
    parser.add_argument("--temperature", type=float, default=0.2, help="0 for greedy answers (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="share of probability to draw from")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="limit of an answer (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="to get the same answers again")


def run(arguments: argparse.Namespace) -> None:
    """Chat until the input ends."""
    options = GenerationOptions(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    chat = Chat(load_pipeline(arguments), options, sys.stdout, arguments.system)
    for source in arguments.image:
        chat.show(source)
    if sys.stdin.isatty():
        print("/help shows the commands.")
    for line in lines(sys.stdin):
        if not chat.handle(line):
            return
