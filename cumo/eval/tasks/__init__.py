# SPDX-License-Identifier: Apache-2.0
"""The benchmarks: reading their published files, and handing answers to the scorers."""

from __future__ import annotations

from cumo.eval.tasks.base import Scores, Task
from cumo.eval.tasks.gqa import Gqa
from cumo.eval.tasks.llava_wild import LlavaWild
from cumo.eval.tasks.mathvista import MathVista
from cumo.eval.tasks.mmbench import MMBench, MMBenchChinese
from cumo.eval.tasks.mme import Mme
from cumo.eval.tasks.mmmu import Mmmu
from cumo.eval.tasks.mmvet import MMVet
from cumo.eval.tasks.pope import Pope
from cumo.eval.tasks.scienceqa import ScienceQA
from cumo.eval.tasks.seed import Seed
from cumo.eval.tasks.textvqa import TextVQA
from cumo.eval.tasks.vqav2 import VqaV2, VqaV2Validation

PUBLISHED_TASKS: tuple[type[Task], ...] = (
    ScienceQA,
    TextVQA,
    Gqa,
    Pope,
    Mme,
    MMBench,
    MMBenchChinese,
    MMVet,
    VqaV2,
    LlavaWild,
    Seed,
    Mmmu,
    MathVista,
)
"""Benchmarks of the published code, in the order of the paper's table."""

_OTHERS: tuple[type[Task], ...] = (VqaV2Validation,)
TASKS: dict[str, type[Task]] = {task.name: task for task in PUBLISHED_TASKS + _OTHERS}
"""All, by name."""

__all__ = ["PUBLISHED_TASKS", "TASKS", "Scores", "Task"]
