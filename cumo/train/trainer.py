# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer with the loss of `cumo.train.losses`, whole checkpoints and a log of what the routers do."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from cumo.train import adapters, checkpoints
from cumo.train.losses import NonFiniteError, check_finite, contributions, count, count_step, weighted
from cumo.train.meter import Meter, flat
from cumo.train.modules import groups_of
from cumo.train.order import Stream
from cumo.train.recipe import DTYPES, Recipe
from cumo.train.sharding import shard, wait_for_all, whole_tensors

METER = "meter.pt"


class CuMoTrainer(Trainer):
    """A Trainer of `CuMoForConditionalGeneration`.

    Args:
        model: with `requires_grad` set.
        recipe: of the stage.
        args: made of the recipe.
        dataset: of examples that carry their `row`; `place` of it says where one is from.
        collator: with `rows`.
        stream: the order of samples over all steps.
        processor: saved beside the model.
    """

    # the loss is that of the whole step, which Trainer neither divides by the passes nor multiplies by the processes
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        recipe: Recipe,
        args: TrainingArguments,
        *,
        dataset: Any,
        collator: Any,
        stream: Stream,
        processor: Any,
        callbacks: Sequence[Any] = (),
    ) -> None:
        self.recipe = recipe
        super().__init__(model=model, args=args, train_dataset=dataset, data_collator=collator, callbacks=[*callbacks])
        self.model_accepts_loss_kwargs = True  # what `loss_is_scaled_for_ga` says to versions before 5.23
        self.stream, self.processor = stream, processor
        self.cumo_config = model.config
        self.meter = Meter(model.config, args.device)
        self.grad_norm = math.nan
        self.began = self.window_began = time.perf_counter()
        self.seconds_before = 0.0
        self._step_rows: list[int] = []
        self._last_rates: dict[str, float] = {}
        self._run_dir: Path | None = None

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, with the FSDP2 settings of `cumo.train.sharding`."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp_plugin_args is not None:
            shard(self.accelerator, self.args.fsdp_plugin_args, DTYPES[self.recipe.precision])
            self.is_fsdp_enabled = True

    def floating_point_ops(self, inputs: Any) -> int:  # noqa: ARG002
        """None are counted: the formula of Trainer knows neither pictures nor experts."""
        return 0

    # ---- data and loss ----

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:  # noqa: ARG002
        return self.stream

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The passes of a step; counts what its means are over."""
        batches = list(islice(epoch_iterator, num_batches))
        self._step_counts = count_step(batches, device)
        self._step_rows = []
        return batches, self._step_counts.trained

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,  # noqa: ARG002
    ) -> Any:
        """What a pass contributes to the loss of the step, times the number of processes, which average gradients.

        Raises:
            NonFiniteError: a part of it is no number.
        """
        inputs = dict(inputs)
        rows: list[int] = inputs.pop("rows").tolist()
        self._step_rows += rows
        output = model(**{**inputs, "use_cache": False})
        of_pass = count(inputs)
        parts = contributions(output, of_pass, self._step_counts)
        check_finite(parts, self.state.global_step + 1, lambda: self._places(rows))
        self.meter.add(parts, output, of_pass)
        loss = weighted(parts, self.cumo_config) * self.accelerator.num_processes
        if not loss.requires_grad:  # text alone, and only what pictures go through trains
            loss = loss + 0.0 * next(p for p in model.parameters() if p.requires_grad).sum()
        return (loss, output) if return_outputs else loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Trainer calls it right before the optimizer's step."""
        norm = super()._get_grad_norm(model, grad_norm)
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is None:  # a step of text alone; see `cumo.train.losses`
                parameter.grad = torch.zeros_like(parameter)
        self.meter.add_step(self._step_counts)
        self._last_rates = {group["name"]: float(group["lr"]) for group in self.optimizer.param_groups}  # type: ignore[union-attr]
        self.grad_norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        # with a scaler of gradients an infinite one is skipped, and the scale lowered
        if not math.isfinite(self.grad_norm) and not self.args.fp16:
            bad = [name for name, p in model.named_parameters() if p.grad is not None and not _finite(p.grad)][:3]
            raise NonFiniteError(
                f"step {self.state.global_step + 1}: the gradient's norm is {self.grad_norm}, first in {bad}, in the "
                f"passes over {self._places(self._step_rows)}"
            )
        return self.grad_norm

    # ---- optimizer ----

    def create_optimizer(self, model: Any = None) -> Any:
        """Create the optimizer with a learning rate for each part; see `cumo.train.modules.groups_of`."""
        if self.optimizer is None:
            model = self.model if model is None else model
            options = self.recipe.optimizer
            groups = groups_of(
                model.named_parameters(),
                self.recipe.train,
                options.lr,
                options.weight_decay,
                self.get_decay_parameter_names(model),
            )
            optimizer_class, arguments = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(groups, **arguments)
        return self.optimizer

    def _places(self, rows: Sequence[int]) -> str:
        """Files, lines and ids of samples."""
        return "; ".join(self.train_dataset.place(row) for row in rows)  # type: ignore[union-attr]

    # ---- log ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Once in `log_steps` steps: a line of log.jsonl, and its numbers to whatever else reports."""
        if "loss" not in logs:
            super().log(logs, start_time)
            return
        self.meter.gather()
        record = self.record() if self.is_world_process_zero() else {}
        self.window_began = time.perf_counter()
        if record:
            with (self.recipe.folder / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        # not through `super`, which keeps every number in the state, and writes all of them into each checkpoint
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, flat(record))

    def record(self) -> dict[str, Any]:
        """A line of the log, as a dictionary; begins a new window."""
        step = self.state.global_step
        record = self.meter.report(self.accelerator.num_processes)
        seconds = max(time.perf_counter() - self.window_began, 1e-9)
        tokens, images = record.pop("tokens"), record.pop("images")
        return {
            "step": step,
            "epoch": round(step / self.stream.steps_per_epoch, 6),
            "lr": self._last_rates,
            "grad_norm": self.grad_norm if math.isfinite(self.grad_norm) else None,
            "tokens/s": round(tokens / seconds, 3),
            "images/s": round(images / seconds, 3),
            "seconds": round(self.seconds(), 3),
            **record,
        }

    def seconds(self) -> float:
        """Seconds of training, earlier runs included."""
        return self.seconds_before + time.perf_counter() - self.began

    # ---- checkpoints ----

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._run_dir is None else str(self._run_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Written aside and renamed, see `cumo.train.checkpoints`.

        Raises:
            CheckpointError: it could not be written; those before it are as they were.
        """
        folder, step = self.recipe.folder, self.state.global_step
        self._run_dir = checkpoints.aside_of(folder, step)
        aside = self._run_dir / checkpoints.name_of(step)
        meter = self.meter.state_dict()
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                torch.save(meter, aside / METER)
                self.processor.save_pretrained(aside)
            wait_for_all()
            if self.is_world_process_zero():
                checkpoints.publish(aside, folder, step)
                shutil.rmtree(self._run_dir)
                checkpoints.rotate(folder, self.recipe.checkpoint.total_limit)
        except Exception as error:  # of the writers each raises its own kind
            shutil.rmtree(self._run_dir, ignore_errors=True)
            last = checkpoints.latest(folder)
            raise checkpoints.CheckpointError(
                f"{checkpoints.name_of(step)}: could not be written: {error}; the last one is "
                f"{'none' if last is None else last.name}"
            ) from error
        finally:
            self._run_dir = None
        wait_for_all()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save the model; with adapters, only what trains."""
        if self.recipe.lora is None:
            super()._save(output_dir, state_dict)
        elif self.args.should_save and output_dir is not None:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            adapters.save(Path(output_dir), self.plain_model(), state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.recipe.lora is None or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            adapters.load(Path(resume_from_checkpoint), self.plain_model())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load to the CPU first: before 5.23 Trainer maps to "cpu:0", which PyTorch does not know."""
        if checkpoint is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        for owner, file in ((self.optimizer, OPTIMIZER_NAME), (self.lr_scheduler, SCHEDULER_NAME)):
            state = torch.load(Path(checkpoint) / file, map_location="cpu", weights_only=True)
            owner.load_state_dict(state)  # type: ignore[union-attr]

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint to the end."""
        path = checkpoint / METER
        if path.is_file():
            state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
            self.meter.load_state_dict(state if self.is_world_process_zero() else {})
        self.train(resume_from_checkpoint=str(checkpoint))

    def plain_model(self) -> Any:
        """The model without what wraps it."""
        return self.accelerator.unwrap_model(self.model)

    def whole_tensors(self) -> dict[str, Tensor] | None:
        """The model's tensors where no process has them whole, in the first process; each has to call it."""
        if self.is_fsdp_enabled:
            return whole_tensors(self.model_wrapped)
        if self.is_deepspeed_enabled:
            tensors: dict[str, Tensor] = self.accelerator.get_state_dict(self.model_wrapped)
            return tensors
        return None


def _finite(grad: Tensor) -> bool:
    local = grad.to_local() if hasattr(grad, "to_local") else grad
    return bool(local.isfinite().all())
