# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.train.interrupted RECIPE PLACE`: train, and be killed, or find the disk full, at a certain place."""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from cumo.train import checkpoints, load_recipe, run_stage, stage
from cumo.train.trainer import CuMoTrainer

STEP = 6  # whose checkpoint is interrupted; those of step 3 are whole


def die() -> None:
    """As by `kill -9`: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


class DieAfterStep(TrainerCallback):
    """Between two checkpoints."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Die after a step that no checkpoint follows."""
        if state.global_step == STEP - 1:
            die()


def die_within(owner: Any, name: str, when: Any, half: Any = None) -> None:
    """Have a function do `half` of its work and die, where `when` its arguments says so."""
    original = getattr(owner, name)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if when(*args, **kwargs):
            if half is not None:
                half(*args)
            die()
        return original(*args, **kwargs)

    setattr(owner, name, interrupted)


def half_a_file(_value: Any, path: Any) -> None:
    """What is there when writing is cut off."""
    Path(path).write_bytes(b"x" * 1000)


def of_step(path: Any) -> bool:
    """Whether a path lies in the checkpoint of `STEP`."""
    return f"checkpoint-{STEP}" in str(path)


def interrupt(place: str) -> None:
    """Set the trap."""
    if place == "between":
        original = stage._set_callbacks

        def with_death(trainer: Any, *args: Any) -> None:
            original(trainer, *args)
            trainer.add_callback(DieAfterStep())

        stage._set_callbacks = with_death
    elif place == "optimizer":
        die_within(torch, "save", lambda _value, path, **_: of_step(path) and "optimizer" in str(path), half_a_file)
    elif place == "manifest":
        die_within(checkpoints, "publish", lambda _aside, _folder, step: step == STEP)
    elif place == "renamed":
        die_within(checkpoints, "rotate", lambda folder, _limit: (folder / f"checkpoint-{STEP}").exists())
    elif place == "removed":
        die_within(
            checkpoints.shutil,
            "rmtree",
            lambda path, **_: str(path).endswith("checkpoint-3.removed") and path.exists(),
            lambda path: (path / "model.safetensors").unlink(),
        )
    elif place == "final":
        die_within(CuMoTrainer, "plain_model", lambda trainer: trainer.state.global_step == trainer.state.max_steps)
    elif place == "full":
        original_save = CuMoTrainer._save_checkpoint

        def on_a_full_disk(trainer: Any, *args: Any) -> None:
            if trainer.state.global_step == STEP:
                resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
            original_save(trainer, *args)

        CuMoTrainer._save_checkpoint = on_a_full_disk
    else:
        raise ValueError(place)


if __name__ == "__main__":
    torch.set_num_threads(1)
    interrupt(sys.argv[2])
    run_stage(load_recipe(sys.argv[1]))
