# SPDX-License-Identifier: Apache-2.0
"""Miniature benchmarks, to be copied before they are changed, and recorded replies of their judge."""

import pytest

from cumo.eval.judges import Recorder
from cumo.eval.tasks import PUBLISHED_TASKS, TASKS
from tests.eval.miniature import ANSWERS, build
from tests.eval.scripted import scripted_judge


@pytest.fixture(scope="session")
def miniature(tmp_path_factory):
    """Folder of all benchmarks."""
    return build(tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture(scope="session")
def replies(miniature, tmp_path_factory):
    """File of the judge's replies to the scripted answers."""
    path = tmp_path_factory.mktemp("judge") / "replies.jsonl"
    for kind in PUBLISHED_TASKS:
        if TASKS[kind.name].judge_settings is not None:
            task = kind(miniature, judge=Recorder(path, scripted_judge))
            questions = task.questions()
            task.score(questions, [ANSWERS[question.id] for question in questions])
    return path
