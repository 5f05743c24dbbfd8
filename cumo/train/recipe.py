# SPDX-License-Identifier: Apache-2.0
"""What a stage of training is: a recipe, checked before anything is loaded. docs/training.md explains every key.

What trains at which stage, and how fast, is data: `STAGES`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cumo.checkpoints.upcycle import Upcycling
from cumo.config import AUX_LOSSES, CONNECTORS
from cumo.data.dataset import IMAGE_ASPECTS, ON_BAD_SAMPLE
from cumo.data.yaml_text import shown
from cumo.models.prompts import Template, get_template
from cumo.train.fields import build, joined, merged
from cumo_kernels.checks import check_one_of

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHARDINGS = ("ddp", "fsdp2")
_MISTRAL, _PAD = "mistral_instruct_system", "pad"
# Of each stage: what is not said in a recipe. True: trains with the learning rate of the optimizer.
STAGES: dict[str, dict[str, Any]] = {
    "pretrain": {
        "train": {"vision": False, "connector": True, "text": False},
        "data": {"template": "plain", "image_aspect": "square", "max_length": 2048},
        "optimizer": {"lr": 1e-3},
    },
    "prefinetune": {"data": {"template": _MISTRAL, "image_aspect": _PAD}, "optimizer": {"lr": 2e-6}},
    "instruct": {"data": {"template": _MISTRAL, "image_aspect": _PAD}, "optimizer": {"lr": 4e-6}},
    "finetune": {"data": {"template": _MISTRAL, "image_aspect": _PAD}, "optimizer": {"lr": 2e-6}},
}


def _positive(owner: Any, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name}: expected a positive number, got {value!r}")


def _not_negative(owner: Any, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name}: expected a number >= 0, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Folders to assemble a model from, at the first stage; see `cumo.checkpoints.assemble`."""

    vision: str
    text: str
    scales: list[int] = field(default_factory=lambda: [1, 3])
    connector_type: str = "mlp2x_gelu"
    high_resolution: bool = False
    keep_unused_layers: bool = False
    seed: int = 0
    """Seed of the connector's weights."""

    def __post_init__(self) -> None:
        check_one_of("connector_type", self.connector_type, CONNECTORS)


@dataclass(frozen=True, kw_only=True)
class Aux:
    """Auxiliary losses of the routers; None leaves what the model's configuration says."""

    mode: str | None = None
    balance: float | None = None
    z: float | None = None

    def __post_init__(self) -> None:
        if self.mode is not None:
            check_one_of("mode", self.mode, AUX_LOSSES)
        _not_negative(self, *(name for name in ("balance", "z") if getattr(self, name) is not None))


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Several samples in a row; see `cumo.data.PackedDataset`."""

    max_length: int
    max_images: int | None = None

    def __post_init__(self) -> None:
        _positive(self, "max_length", "max_images")


@dataclass(frozen=True, kw_only=True)
class Data:
    """The training data; see `cumo.data.ConversationDataset`."""

    path: str
    """A .json, .jsonl or, for a mixture, .yaml file."""
    image_folder: str | None = None
    """Folder that the paths of pictures are relative to, for a .json or .jsonl file; by default the file's own."""
    template: str | Template = _MISTRAL
    max_length: int = 4096
    image_aspect: str = _PAD
    on_bad_sample: str = "stop"
    group_by_modality_length: bool = True
    """Batches of one modality and similar lengths; otherwise a plain shuffle."""
    packing: Packing | None = None
    workers: int = 4

    def __post_init__(self) -> None:
        get_template(self.template)
        check_one_of("image_aspect", self.image_aspect, IMAGE_ASPECTS)
        check_one_of("on_bad_sample", self.on_bad_sample, ON_BAD_SAMPLE)
        _positive(self, "max_length")
        _not_negative(self, "workers")


@dataclass(frozen=True, kw_only=True)
class Train:
    """What trains: false for frozen, true for the optimizer's learning rate, or a learning rate of its own."""

    vision: bool | float = True
    connector: bool | float = True
    text: bool | float = True
    routers: bool | float | None = None
    """The routers of all parts; null as the part that they are in."""

    def __post_init__(self) -> None:
        values = dataclasses.asdict(self)
        for name, value in values.items():
            if not isinstance(value, (bool, type(None))) and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}: expected true, false or a positive learning rate, got {value!r}")
        if not any(values.values()):
            raise ValueError("train: expected something to train, got all parts frozen")


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """An optimizer of transformers' Trainer."""

    lr: float
    name: str = "adamw_torch"
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    """0 for no clipping."""

    def __post_init__(self) -> None:
        _positive(self, "lr", "eps")
        _not_negative(self, "weight_decay", "max_grad_norm")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {self.betas}")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A learning-rate schedule of transformers."""

    name: str = "cosine"
    warmup: float = 0.03
    """Steps, or below 1 a share of all steps."""

    def __post_init__(self) -> None:
        _not_negative(self, "warmup")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples (with packing: rows) of a step of the optimizer, and of one pass of one process.

    How many passes make a step follows from the number of processes.
    """

    global_batch_size: int = 256
    per_device_batch_size: int = 8

    def __post_init__(self) -> None:
        _positive(self, "global_batch_size", "per_device_batch_size")

    def accumulation(self, processes: int) -> int:
        """Passes per step.

        Raises:
            ValueError: it comes out uneven.
        """
        together = processes * self.per_device_batch_size
        if self.global_batch_size % together:
            raise ValueError(
                f"batch.global_batch_size: expected a multiple of {together} ({processes} processes x "
                f"per_device_batch_size {self.per_device_batch_size}), got {self.global_batch_size}"
            )
        return self.global_batch_size // together


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """When to write what is needed to go on after an interruption."""

    save_steps: int = 500
    total_limit: int = 2
    """Keep so many; there is room for one more needed while it is written."""

    def __post_init__(self) -> None:
        _positive(self, "save_steps", "total_limit")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters on the language model, whose own weights stay as they are; the rest trains as `train` says."""

    rank: int = 64
    alpha: int = 16
    dropout: float = 0.05
    targets: list[str] | None = None
    """Last names of linear layers; null for all but the output embedding and the routers."""
    bits: int | None = None
    """4 to load the language model quantised (QLoRA, arXiv 2305.14314); needs bitsandbytes."""

    def __post_init__(self) -> None:
        _positive(self, "rank", "alpha")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected a number in [0, 1), got {self.dropout}")
        if self.bits not in (None, 4):
            raise ValueError(f"bits: expected 4 or null, got {self.bits}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A stage of training.

    Raises:
        ValueError: values do not fit one another; names the key.
    """

    stage: str
    model: str | Parts
    """A folder (of this package's layout or the published one) or, at the first stage, parts."""
    data: Data
    output_dir: str
    optimizer: Optimizer
    upcycle: Upcycling | None = None
    aux: Aux = field(default_factory=Aux)
    train: Train = field(default_factory=Train)
    schedule: Schedule = field(default_factory=Schedule)
    batch: Batch = field(default_factory=Batch)
    checkpoint: Checkpoints = field(default_factory=Checkpoints)
    epochs: float = 1.0
    steps: int | None = None
    """Number of optimizer steps, instead of `epochs`."""
    precision: str = "bf16"
    gradient_checkpointing: bool = True
    lora: Lora | None = None
    distributed: str = "ddp"
    """"ddp", "fsdp2" or the path of a DeepSpeed configuration."""
    seed: int = 42
    log_steps: int = 1
    report_to: str | list[str] = "none"
    attention: str = "sdpa"
    model_base: str | None = None
    """Folder of the model that a published adapter or first stage builds on."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Further `transformers.TrainingArguments`."""

    def __post_init__(self) -> None:
        check_one_of("stage", self.stage, STAGES)
        check_one_of("precision", self.precision, DTYPES)
        _positive(self, "epochs", "steps", "log_steps")
        if self.upcycle is not None and self.stage == "finetune":
            raise ValueError("upcycle: expected null at stage finetune, which continues from a model as it is")
        if self.distributed not in SHARDINGS and not self.distributed.endswith(".json"):
            raise ValueError(f"distributed: expected ddp, fsdp2 or a DeepSpeed .json, got {self.distributed!r}")
        if self.data.packing is not None and self.data.packing.max_length < self.data.max_length:
            raise ValueError(
                f"data.packing.max_length: expected at least data.max_length={self.data.max_length}, "
                f"got {self.data.packing.max_length}"
            )
        if self.lora is not None and not self.train.text:
            raise ValueError("lora: expected train.text on, as its adapters are those of the language model")
        if self.lora is not None and self.lora.bits is not None and self.distributed != "ddp":
            raise ValueError(f"lora.bits: expected distributed: ddp with quantised weights, got {self.distributed!r}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """A recipe of nested mappings, as YAML gives them; what they lack comes from `STAGES` and the defaults.

        Raises:
            ValueError: a key is unknown or missing, or a value does not fit; names the key by its path.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"recipe: expected keys and values, got {shown(values)}")
        stage = values.get("stage")
        if not isinstance(stage, str) or stage not in STAGES:
            raise ValueError(f"stage: expected one of {list(STAGES)}, got {shown(stage)}")
        return build(
            cls,
            merged(
                STAGES[stage], {key: {} if value is None and key in _NESTED else value for key, value in values.items()}
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, of which `from_dict` makes the same recipe."""
        return dataclasses.asdict(self)

    @property
    def folder(self) -> Path:
        """`output_dir`."""
        return Path(self.output_dir)


_NESTED = ("aux", "train", "schedule", "batch", "checkpoint", "data", "optimizer")


def differences(one: Mapping[str, Any], other: Mapping[str, Any], where: str = "") -> dict[str, tuple[Any, Any]]:
    """Paths at which two recipes as dictionaries differ, with both values."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys([*one, *other]):
        path, first, second = joined(where, key), one.get(key), other.get(key)
        if isinstance(first, Mapping) and isinstance(second, Mapping):
            found.update(differences(first, second, path))
        elif first != second:
            found[path] = (first, second)
    return found
