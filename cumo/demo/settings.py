# SPDX-License-Identifier: Apache-2.0
"""Sizes, steps and learning rates of the demo, as data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A run: nothing else decides what it computes. Learning rates are the highest of a cosine."""

    seed: int = 0
    most_digits: int = 2
    """Most digits of a scene."""
    training_scenes: int = 8000
    test_scenes: int = 250
    """Each is asked one question of every kind that fits it."""

    patch_size: int = 8
    scales: tuple[int, ...] = (1, 2)
    vision_width: int = 96
    vision_hidden: int = 256
    vision_layers: int = 4
    """The features are those of the last but one."""
    experts: int = 4
    top_k: int = 2
    balance: float = 0.1
    z: float = 0.01
    """Weights of the auxiliary losses, as published."""

    clip_steps: int = 800
    clip_batch: int = 128
    clip_lr: float = 3e-3
    vocabulary: int = 480
    text_width: int = 96
    text_layers: int = 4
    rope_theta: float = 30.0
    text_steps: int = 600
    text_batch: int = 32
    text_lr: float = 3e-3

    batch: int = 16
    pretrain_steps: int = 400
    pretrain_lr: float = 3e-3
    prefinetune_steps: int = 1600
    prefinetune_lr: float = 1.5e-3
    vision_lr: float = 3e-4
    """Learning rate of the encoder, whose features are good already; all else has the stage's."""
    instruct_steps: int = 500
    instruct_lr: float = 1e-3

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self._fields()}

    def _fields(self) -> list[tuple[str, Any]]:
        return [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]


FULL = Settings()
# Every stage, to see that all of it works; nothing is learnt.
QUICK = Settings(
    training_scenes=96,
    test_scenes=6,
    vision_width=32,
    vision_hidden=48,
    vision_layers=3,
    text_width=32,
    text_layers=2,
    clip_steps=4,
    clip_batch=16,
    text_steps=4,
    batch=8,
    pretrain_steps=3,
    prefinetune_steps=4,
    instruct_steps=4,
)
