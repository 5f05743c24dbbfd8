# SPDX-License-Identifier: Apache-2.0
"""The chat: its history and commands, and the whole command in a pseudo-terminal."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest

from cumo.inference import GenerationOptions
from cumo.inference.chat import Chat, printable
from tests.inference.tiny import picture

OPTIONS = GenerationOptions(max_new_tokens=8)


@pytest.fixture
def chat(pipeline):
    return Chat(pipeline, OPTIONS, io.StringIO())


@pytest.fixture
def png(tmp_path):
    picture(3).save(tmp_path / "a picture.png")
    return tmp_path / "a picture.png"


def output(chat):
    text = chat._out.getvalue()
    chat._out.seek(0)
    chat._out.truncate()
    return text


def test_turns_and_their_history(chat, pipeline, png):
    assert chat.handle(f"/image {png}")
    assert output(chat) == "[picture of 30 x 20 pixels: ask something about it]\n"
    assert chat.handle("What is this?")
    first = output(chat)
    assert chat.handle("And now?")
    second = output(chat)
    roles = [message["role"] for message in chat.messages]
    assert roles == ["user", "assistant"] * 2
    assert [part["type"] for part in chat.messages[0]["content"]] == ["image", "text"]
    assert [part["type"] for part in chat.messages[2]["content"]] == ["text"]
    assert (first, second) == tuple(chat.messages[index]["content"] + "\n" for index in (1, 3))
    (expected,) = pipeline.generate([chat.messages[:3]], OPTIONS)
    assert second == expected.text + "\n"
    prompt = pipeline.processor.apply_chat_template(
        [*chat.messages, {"role": "user", "content": "?"}], tokenize=False, add_generation_prompt=True
    )
    ids = pipeline.processor.prompt_ids(prompt)
    assert ids.count(pipeline.processor.tokenizer.eos_token_id) == 2  # one for each answer
    assert f" {first.strip()} </s>[INST] And now? [/INST]" in prompt


def test_reset_forgets_everything_but_the_system_prompt(pipeline, png):
    chat = Chat(pipeline, OPTIONS, io.StringIO(), system="You are brief.")
    chat.handle(f"/image {png}")
    chat.handle("What?")
    chat.handle(f"/image {png}")
    chat.handle("/reset")
    assert chat.messages == [{"role": "system", "content": "You are brief."}]
    chat.handle("What?")
    assert all(part["type"] == "text" for part in chat.messages[1]["content"])


def test_several_pictures_go_with_the_next_question(chat, png):
    chat.handle(f"/image {png}")
    chat.handle(f"/image '{png}'")
    chat.handle("Compare them.")
    assert [part["type"] for part in chat.messages[0]["content"]] == ["image", "image", "text"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/help", "/image PATH"),
        ("/image", r"\[/image needs a path: see /help\]"),
        ("/image /absent.png", r"\[no picture: .*No such file"),
        ("/image http://localhost:1/a.png", r"\[no picture: localhost: could not be read"),
        ("/quit", r"\[unknown command /quit: see /help\]"),
        ("", "^$"),
    ],
)
def test_commands_say_what_is_wrong(chat, line, said):
    assert chat.handle(line)
    assert re.search(said, output(chat))
    assert chat.messages == []


def test_exit(chat):
    assert chat.handle("/exit") is False


def test_a_conversation_that_is_too_long_is_not_asked(chat, pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.model.config.text_config, "max_position_embeddings", 20)
    chat.handle("What is this?")
    assert "not asked: messages: expected a prompt below the 20 tokens" in output(chat)
    assert chat.messages == []


def test_a_question_that_is_stopped_before_it_was_asked(chat, pipeline, monkeypatch):
    def stream(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "stream", stream)
    assert chat.handle("What?")
    assert output(chat) == "[not asked]\n"
    assert chat.messages == []


def test_an_answer_that_is_stopped_keeps_what_was_said(chat, pipeline, monkeypatch):
    def stream(*_):
        yield "A cat"
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "stream", stream)
    chat.handle("What?")
    assert output(chat) == "A cat [stopped]\n"
    assert chat.messages[1] == {"role": "assistant", "content": "A cat"}


def test_answers_cannot_steer_the_terminal():
    assert printable("a\x1b[2J\x07b\n\tc\u202e") == "a[2Jb\n\tc"


# Makes its standard input the terminal that it obeys, so that Ctrl-C reaches it, as a shell does that one types into;
# tests that run in the background have been told to ignore Ctrl-C.
IN_A_TERMINAL = """
import fcntl, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)
from cumo.cli import main
sys.exit(main())
"""


class Terminal:
    """The command in a pseudo-terminal."""

    def __init__(self, *arguments):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", IN_A_TERMINAL, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=os.environ | {"TERM": "dumb"},
            start_new_session=True,
        )
        os.close(slave)
        self.seen = ""
        self.shown = ""

    def expect(self, pattern, timeout=180.0):
        """What comes until the pattern."""
        assert self.comes(pattern, timeout), f"expected {pattern!r}, got {self.shown[-2000:]!r}"

    def comes(self, pattern, timeout):
        """Whether the pattern comes in time; if so, everything up to its end is done with."""
        end = time.monotonic() + timeout
        while not (match := re.search(pattern, self.seen)):
            ready, _, _ = select.select([self.master], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                return False
            text = os.read(self.master, 4096).decode("utf-8", "replace")
            self.seen += text
            self.shown += text
        self.seen = self.seen[match.end() :]
        return True

    def interrupt(self, pattern):
        """Press Ctrl-C until the pattern comes.

        Python's `input` prints its prompt, and every key, a moment before it waits. A Ctrl-C within that moment, which
        a program can hit and a person cannot, is acted on at the next key only.
        """
        for _ in range(18):
            self.type("\x03")
            if self.comes(pattern, timeout=10.0):
                return
        raise AssertionError(f"expected {pattern!r}, got {self.shown[-2000:]!r}")

    def type(self, text):
        os.write(self.master, text.encode())


@pytest.mark.slow
def test_the_command_in_a_terminal(folder, png):
    arguments = ["--device", "cpu", "--max-new-tokens", "100000", "--temperature", "0"]
    terminal = Terminal("chat", str(folder), *arguments)
    try:
        terminal.expect("/help shows the commands")
        terminal.expect("> ")
        terminal.type(f"/image {png}\n")
        terminal.expect(r"\[picture of 30 x 20 pixels")
        terminal.expect("> ")
        terminal.type("What is this?\n")
        terminal.expect(r"What is this\?\r\n")
        terminal.expect(r"\S{3}")  # the answer begins, and would go on for minutes
        terminal.interrupt(r"\[stopped\]")
        terminal.expect("> ")
        terminal.type("half a line")
        terminal.expect("half a line")  # a Ctrl-C drops what was typed and not read: readline would wait for it
        terminal.interrupt("Ctrl-D or /exit to leave")
        terminal.expect("> ")
        terminal.type("/reset\n")
        terminal.expect(r"\[forgotten\]")
        terminal.expect("> ")
        terminal.type("/exit\n")
        assert terminal.process.wait(timeout=30) == 0
    finally:
        if terminal.process.poll() is None:
            terminal.process.send_signal(signal.SIGKILL)
            terminal.process.wait()
        os.close(terminal.master)


@pytest.mark.slow
def test_the_command_in_a_pipe(folder, png):
    arguments = ["--device", "cpu", "--max-new-tokens", "8", "--temperature", "0", "--image", str(png)]
    command = [sys.executable, "-m", "cumo", "chat", str(folder), *arguments]
    result = subprocess.run(command, input="What?\nWhy?\n", capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    shown, first, second = result.stdout.splitlines()
    assert shown.startswith("[picture of 30 x 20")
    assert first
    assert second
    absent = subprocess.run(
        [*command[:4], "/absent"], input="", capture_output=True, text=True, timeout=120, check=False
    )
    assert absent.returncode == 2
    assert "cumo chat: error: " in absent.stderr
