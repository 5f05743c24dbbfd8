# SPDX-License-Identifier: Apache-2.0
"""A recipe as the arguments of transformers' Trainer."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from typing import Any

import torch
from transformers import TrainingArguments

from cumo.train.recipe import SHARDINGS, Recipe

# What a recipe says itself, or what exactness rests on
_RESERVED = {
    "accelerator_config", "average_tokens_across_devices", "bf16", "data_seed", "dataloader_drop_last", "deepspeed",
    "disable_tqdm", "fp16", "fsdp", "gradient_accumulation_steps", "gradient_checkpointing", "ignore_data_skip",
    "learning_rate", "logging_steps", "lr_scheduler_type", "max_grad_norm", "max_steps", "num_train_epochs", "optim",
    "output_dir", "per_device_train_batch_size", "remove_unused_columns", "report_to", "save_steps", "save_strategy",
    "save_total_limit", "seed", "warmup_steps", "weight_decay", "dataloader_num_workers",
}  # fmt: skip


def processes() -> int:
    """How many train together, as `torchrun` says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def training_arguments(recipe: Recipe, steps: int) -> TrainingArguments:
    """Arguments for so many steps; making them joins the processes of `torchrun`.

    Raises:
        ValueError: `trainer` has what the recipe says elsewhere or what does not exist, or batch sizes do not fit.
    """
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for key in recipe.trainer:
        if key in _RESERVED or key not in known:
            what = "is said by other keys of the recipe" if key in _RESERVED else "does not exist"
            raise ValueError(f"trainer.{key}: expected an argument of TrainingArguments; this one {what}")
    gpu = torch.cuda.is_available()
    optimizer = recipe.optimizer
    arguments: dict[str, Any] = {
        "output_dir": recipe.output_dir,
        "per_device_train_batch_size": recipe.batch.per_device_batch_size,
        "gradient_accumulation_steps": recipe.batch.accumulation(processes()),
        "max_steps": steps,
        "learning_rate": optimizer.lr,
        "weight_decay": optimizer.weight_decay,
        "adam_beta1": optimizer.betas[0],
        "adam_beta2": optimizer.betas[1],
        "adam_epsilon": optimizer.eps,
        "max_grad_norm": optimizer.max_grad_norm,
        "optim": optimizer.name,
        "lr_scheduler_type": recipe.schedule.name,
        "warmup_steps": recipe.schedule.warmup if recipe.schedule.warmup < 1 else int(recipe.schedule.warmup),
        "bf16": recipe.precision == "bf16",
        "fp16": recipe.precision == "fp16",
        "use_cpu": not gpu,
        "logging_strategy": "steps",
        "logging_steps": recipe.log_steps,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": recipe.checkpoint.save_steps,
        "seed": recipe.seed,
        "dataloader_num_workers": recipe.data.workers,
        "dataloader_pin_memory": gpu,
        "remove_unused_columns": False,
        "report_to": recipe.report_to,
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
        "label_names": ["labels"],
        **_sharding(recipe, known),
        **recipe.trainer,
    }
    try:
        args = TrainingArguments(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"trainer: {error}") from error
    if args.n_gpu > 1:
        args._n_gpu = 1  # torchrun, not threads, trains on several
    return args


def _sharding(recipe: Recipe, known: set[str]) -> dict[str, Any]:
    """What `distributed` and `gradient_checkpointing` ask for.

    Activations are checkpointed by the layers themselves, also under FSDP2: accelerate's way of it does not restore the
    random numbers of dropout, which makes other gradients than those of the loss.
    """
    # the name changed in transformers 5.23
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    options = {name: recipe.gradient_checkpointing, f"{name}_kwargs": {"use_reentrant": False}}
    if recipe.distributed == "fsdp2" and processes() > 1:
        config = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": "SHARDED_STATE_DICT"}
        return {**options, "fsdp": True, "fsdp_config": config}
    if recipe.distributed in SHARDINGS:
        return options
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError("distributed: expected ddp or fsdp2, as DeepSpeed is not installed")
    return {**options, "deepspeed": recipe.distributed}
