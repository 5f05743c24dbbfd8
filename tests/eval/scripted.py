# SPDX-License-Identifier: Apache-2.0
"""`cumo eval` with a scripted model on the miniature benchmarks; a program, to be run in several processes.

python -m tests.eval.scripted DATA [--kill-after BATCHES] ARGUMENTS_OF_CUMO_EVAL
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from cumo.eval import command
from cumo.eval.questions import Question
from tests.eval.miniature import ANSWERS, JUDGEMENTS, build


class ScriptedModel:
    """Replies what `ANSWERS` says, once the miniature data are built; opens every picture."""

    def __init__(self, fingerprint: str = "scripted", kill_after: int | None = None) -> None:
        self.name = "scripted model"
        self.fingerprint = fingerprint
        self.kill_after = kill_after
        self.asked: list[str] = []
        self.batches = 0

    def answer(self, questions: Sequence[Question], max_new_tokens: int) -> list[str]:
        """See `cumo.eval.questions.Model`."""
        if self.batches == self.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        self.batches += 1
        assert max_new_tokens in (128, 1024)
        for question in questions:
            self.asked.append(question.id)
            for picture in question.pictures:
                assert picture.open().mode == "RGB"
        return [f" {ANSWERS[question.id]}\n" for question in questions]


def scripted_judge(prompt: str) -> str:
    """The reply to the only key of `JUDGEMENTS` that the prompt holds."""
    (reply,) = (reply for key, reply in JUDGEMENTS.items() if key in prompt)
    return reply


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("miniature", type=Path)
    parser.add_argument("--kill-after", type=int)
    own, rest = parser.parse_known_args()
    build(own.miniature)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    arguments = parser.parse_args(["--data", str(own.miniature), "--model", "scripted", *rest])
    command.run(arguments, ScriptedModel(kill_after=own.kill_after))


if __name__ == "__main__":
    main()
