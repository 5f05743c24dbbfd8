# SPDX-License-Identifier: Apache-2.0
"""One stage of training, from a recipe to a folder that `from_pretrained` opens."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import distributed
from transformers import set_seed

from cumo.checkpoints.assemble import assemble_checkpoint, assemble_processor, write_model
from cumo.checkpoints.convert import convert_to_native
from cumo.checkpoints.files import read_json, reading, written_aside
from cumo.checkpoints.lora import is_adapter
from cumo.checkpoints.published_config import is_published
from cumo.checkpoints.published_folder import read_config
from cumo.checkpoints.upcycle import upcycle_checkpoint
from cumo.config import CuMoConfig
from cumo.data import (
    BadSampleError,
    Collator,
    ConversationDataset,
    DataReport,
    DataSource,
    PackedDataset,
    check_data,
    read_sources,
)
from cumo.data.yaml_text import parse_yaml, shown
from cumo.models.cumo import CuMoForConditionalGeneration
from cumo.models.processor import CuMoProcessor
from cumo.models.prompts import Template, chat_template, chat_templates
from cumo.models.quantization import check_quantizable
from cumo.train import adapters, checkpoints
from cumo.train.arguments import processes, training_arguments
from cumo.train.files import dump
from cumo.train.modules import freeze, set_dtypes, summary
from cumo.train.order import steps_per_epoch, stream_of
from cumo.train.progress import Progress
from cumo.train.recipe import DTYPES, Parts, Recipe, differences
from cumo.train.sharding import is_joined, wait_for_all
from cumo.train.trainer import CuMoTrainer

logger = logging.getLogger(__name__)

FINAL, START, DENSE, RESULT = "final", "start", "start-dense", "result.json"
# What may differ between the runs of one `output_dir`, as the steps do not depend on it
_FREE = (
    "output_dir", "log_steps", "report_to", "checkpoint.", "data.workers", "batch.per_device_batch_size", "trainer.",
    "attention", "gradient_checkpointing",
)  # fmt: skip


class StageResult(NamedTuple):
    """The result of a stage."""

    folder: Path
    """Folder of the trained model and its processor."""
    steps: int
    loss: float
    """Mean of the log's losses in the last tenth of the steps."""
    seconds: float
    """Seconds of training, over all runs."""


def run_stage(recipe: Recipe) -> StageResult:
    """Train, from the last whole checkpoint in `output_dir` if there is one; a stage that is done is not done again.

    Under `torchrun` all processes call this. `output_dir` is to be on a disk that they share.

    Args:
        recipe: what to do.

    Raises:
        ValueError: the recipe does not fit its files, or is not that of the run in `output_dir`; a sample is bad.
        NonFiniteError: a loss or gradient is no number; the last checkpoint is kept.
        OSError: something cannot be read or written.
    """
    recipe.folder.mkdir(parents=True, exist_ok=True)
    _compare_with_run(recipe)
    done = recipe.folder / FINAL / RESULT
    if done.is_file():
        logger.info("%s: done already", recipe.folder / FINAL)
        return _result_of(recipe)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a sample is tokenized at a time, by workers that fork
    recipe.batch.accumulation(processes())
    if processes() > 1:
        training_arguments(recipe, 1)  # joins the processes, which are to wait for the first one
    with _first_process_first():
        start = prepare_start(recipe)
    processor = _processor(recipe, start)
    dataset = load_dataset(recipe, processor)
    steps = recipe.steps or math.ceil(recipe.epochs * steps_per_epoch(len(dataset), recipe.batch.global_batch_size))
    args = training_arguments(recipe, steps)
    set_seed(recipe.seed)
    model = load_model(recipe, start)
    trainer = CuMoTrainer(
        model,
        recipe,
        args,
        dataset=dataset,
        collator=Collator(processor.tokenizer.pad_token_id, rows=True),
        stream=stream_of(
            dataset,
            recipe.batch.global_batch_size,
            steps,
            grouped=recipe.data.group_by_modality_length,
            seed=recipe.seed,
        ),
        processor=processor,
    )
    first = trainer.is_world_process_zero()
    _set_callbacks(trainer, recipe, first)
    if first:
        checkpoints.tidy(recipe.folder)
        (recipe.folder / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
    wait_for_all()
    seconds = _train(trainer, recipe, first)
    if dataset.skipped:
        logger.warning("%d samples were left out: %s", len(dataset.skipped), ", ".join(dataset.skipped))
    _save_final(trainer, recipe, seconds)
    return _result_of(recipe)


def prepare_start(recipe: Recipe) -> Path:
    """The folder of the model to begin with: as named, or assembled or upcycled into `output_dir`, once."""
    folder = recipe.folder / START
    if folder.is_dir():
        return folder
    model, base = recipe.model, None if recipe.model_base is None else Path(recipe.model_base)
    if isinstance(model, Parts):
        dense = folder if recipe.upcycle is None else recipe.folder / DENSE
        if not dense.is_dir():
            assemble_checkpoint(
                Path(model.vision),
                Path(model.text),
                dense,
                scales=model.scales,
                connector_type=model.connector_type,
                high_resolution=model.high_resolution,
                keep_unused_layers=model.keep_unused_layers,
                seed=model.seed,
            )
        source = dense
    else:
        source = Path(model)
    published = is_published(read_config(source))
    if recipe.upcycle is not None:
        upcycle_checkpoint(source, folder, recipe.upcycle, base)
        return folder
    if recipe.lora is not None and (published or is_adapter(source)):
        convert_to_native(source, folder, base)  # what the adapters will name as their base
        return folder
    return source


def sources_of(recipe: Recipe) -> list[DataSource]:
    """The files of a recipe."""
    sources = read_sources(recipe.data.path)
    if recipe.data.image_folder is None:
        return sources
    if Path(recipe.data.path).suffix in (".yaml", ".yml"):
        raise ValueError("data.image_folder: expected null with a mixture, whose entries have their own, got a folder")
    return [replace(source, image_folder=recipe.data.image_folder) for source in sources]


def _processor(recipe: Recipe, start: Path) -> Any:
    """The model's, with the chat template of what it is trained on; a named one only takes the place of a named one."""
    processor = CuMoProcessor.from_pretrained(start)
    template, ours = recipe.data.template, chat_templates()
    if isinstance(template, Template) and not template.only_images:
        processor.chat_template = chat_template(template)
    elif template in ours and processor.chat_template in ours.values():
        processor.chat_template = ours[template]
    return processor


def load_dataset(recipe: Recipe, processor: Any) -> ConversationDataset | PackedDataset:
    """Open the training data of a recipe."""
    data = recipe.data
    shown = processes() == 1 or not distributed.is_initialized() or distributed.get_rank() == 0
    dataset = ConversationDataset(
        sources_of(recipe),
        processor,
        data.template,
        max_length=data.max_length,
        on_bad_sample=data.on_bad_sample,
        image_aspect=data.image_aspect,
        seed=recipe.seed,
        progress=shown,
    )
    if data.packing is None:
        return dataset
    packing = data.packing
    return PackedDataset(
        dataset, packing.max_length, packing.max_images, recipe.seed, workers=data.workers, progress=shown
    )


def check_recipe(recipe: Recipe, *, progress: bool = True) -> DataReport:
    """Read all data of a recipe, and report every fault; nothing is trained or written.

    Raises:
        ValueError: the model's processor cannot be had.
    """
    data = recipe.data
    return check_data(
        sources_of(recipe),
        processor_of(recipe),
        data.template,
        data.max_length,
        workers=data.workers,
        progress=progress,
    )


def processor_of(recipe: Recipe) -> Any:
    """The processor of the model that a recipe begins with."""
    if isinstance(recipe.model, Parts):
        return assemble_processor(
            Path(recipe.model.vision),
            Path(recipe.model.text),
            largest_scale=recipe.model.scales[-1] if recipe.model.high_resolution else None,
        )
    read_config(Path(recipe.model))
    return CuMoProcessor.from_pretrained(recipe.model)


def load_model(recipe: Recipe, start: Path) -> Any:
    """The model, with the recipe's losses, and with frozen what it freezes."""
    lora, compute = recipe.lora, DTYPES[recipe.precision]
    if lora is not None and lora.bits is not None:
        check_quantizable("lora.bits", CuMoConfig.from_pretrained(start))
    quantization = None if lora is None else adapters.quantization(lora, compute)
    options = {} if quantization is None else {"quantization_config": quantization}
    if recipe.model_base is not None:
        options["model_base"] = recipe.model_base
    model = CuMoForConditionalGeneration.from_pretrained(
        start, dtype="auto", attn_implementation=recipe.attention, **options
    )
    config = model.config
    for name, value in (
        ("aux_loss", recipe.aux.mode),
        ("balance_loss_coef", recipe.aux.balance),
        ("router_z_loss_coef", recipe.aux.z),
    ):
        if value is not None:
            setattr(config, name, value)
    if lora is not None:
        adapters.add_adapters(model, lora, str(start.resolve()))
    freeze(model, recipe.train, adapters=lora is not None)
    set_dtypes(model, compute)
    for part, total, trains in summary(model):
        logger.info("%s: %d parameters, %d of them train", part, total, trains)
    return model


def _set_callbacks(trainer: CuMoTrainer, recipe: Recipe, first: bool) -> None:
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress(recipe.stage, shown=first))


def _train(trainer: CuMoTrainer, recipe: Recipe, first: bool) -> float:
    """Train to the end; the seconds of all runs."""
    checkpoint = checkpoints.latest(recipe.folder)
    before = 0.0
    if first:
        before = _cut_log(recipe.folder / "log.jsonl", 0 if checkpoint is None else checkpoints.step_of(checkpoint))
    trainer.seconds_before, trainer.began = before, time.perf_counter()
    try:
        if checkpoint is None:
            trainer.train()
        else:
            logger.info("going on from %s", checkpoint)
            trainer.resume(checkpoint)
    except BadSampleError as error:
        # from a worker of the DataLoader comes the traceback as text, with what matters in its last line
        raise BadSampleError(str(error).strip().rpartition("BadSampleError: ")[2]) from error
    return trainer.seconds()


def _cut_log(log: Path, step: int) -> float:
    """Keep the lines up to a step; the seconds that the last of them tells."""
    if not log.is_file():
        return 0.0
    kept = [line for line in _lines(log) if line["step"] <= step]
    aside = log.with_name(f".{log.name}.incomplete")
    aside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    aside.replace(log)
    return float(kept[-1]["seconds"]) if kept else 0.0


def _lines(log: Path) -> list[dict[str, Any]]:
    """Read a log; the last line may be cut off where a process was killed."""
    lines = []
    for text in log.read_bytes().splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            break
        if not isinstance(line, dict) or not {"step", "seconds", "loss"} <= line.keys():
            break
        lines.append(line)
    return lines


def _save_final(trainer: CuMoTrainer, recipe: Recipe, seconds: float) -> None:
    """The trained model, its processor and what came of the stage, written aside and renamed."""
    tensors = trainer.whole_tensors()
    if trainer.is_world_process_zero():
        lines = _lines(recipe.folder / "log.jsonl")
        last = [line["loss"] for line in lines if line["step"] > 0.9 * trainer.state.global_step] or [math.nan]
        model = trainer.plain_model()
        with written_aside(recipe.folder / FINAL) as folder:
            if recipe.lora is not None:
                adapters.save(folder, model, tensors)
            else:
                write_model(folder, model, DTYPES[recipe.precision], tensors)
            trainer.processor.save_pretrained(folder)
            result = {"steps": trainer.state.global_step, "loss": sum(last) / len(last), "seconds": seconds}
            (folder / RESULT).write_text(json.dumps(result) + "\n")
    wait_for_all()


def _result_of(recipe: Recipe) -> StageResult:
    folder = recipe.folder / FINAL
    with reading(folder / RESULT, "what came of a stage"):
        return StageResult(folder, **read_json(folder / RESULT))


def _compare_with_run(recipe: Recipe) -> None:
    """Refuse to mix two runs in one folder."""
    path = recipe.folder / "recipe.yaml"
    if not path.is_file():
        return
    there = parse_yaml(path.read_bytes(), str(path))
    if not isinstance(there, dict):
        raise ValueError(f"{path}: expected the recipe of the run in this folder, got {shown(there)}")
    differing = {
        key: values for key, values in differences(there, recipe.to_dict()).items() if not key.startswith(_FREE)
    }
    if differing:
        told = "; ".join(f"{key}: {old!r} there, {new!r} now" for key, (old, new) in differing.items())
        raise ValueError(f"output_dir: expected a folder without a run of another recipe, got {recipe.folder}: {told}")


@contextmanager
def _first_process_first() -> Iterator[None]:
    """The others begin once the first has ended."""
    joined = is_joined()
    if joined and distributed.get_rank() > 0:
        distributed.barrier()
    yield
    if joined and distributed.get_rank() == 0:
        distributed.barrier()
