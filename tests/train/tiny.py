# SPDX-License-Identifier: Apache-2.0
"""Folders of a small encoder, a small language model and small data, and recipes for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tests.data.samples import Files, byte_tokenizer, llava
from tests.models.tiny import ENCODER, MIXTRAL, TEXT


def write_parts(
    folder: Path, text_type: str = "llama", text: dict[str, Any] | None = None, **tokens: Any
) -> dict[str, Any]:
    """A CLIP and a language model as transformers saves them, as `model` of a recipe.

    `text` changes the configuration of the language model, `tokens` are those of `byte_tokenizer`.
    """
    torch.manual_seed(0)
    fields = {**TEXT, **(MIXTRAL if text_type == "mixtral" else {}), **(text or {})}
    tokenizer = byte_tokenizer(**tokens)
    config = AutoConfig.for_model(text_type, **{**fields, "vocab_size": len(tokenizer)})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    vision = {key: value for key, value in ENCODER.items() if key != "model_type"}
    AutoModel.from_config(AutoConfig.for_model("clip_vision_model", **vision)).save_pretrained(folder / "clip")
    return {"vision": str(folder / "clip"), "text": str(folder / "text"), "scales": [1, 2]}


def write_data(folder: Path, samples: int = 24, text_only: int = 3) -> str:
    """Questions of different lengths about noise; one in `text_only` has no picture, some have two."""
    folder.mkdir(exist_ok=True)
    files = Files(folder)
    rng = np.random.default_rng(0)
    rows = []
    for index in range(samples):
        images = [] if index % text_only == 0 else [files.picture(f"{index}.png", seed=index)] * (1 + index % 2)
        question, answer = "q" * int(rng.integers(1, 9)), "yes " * int(rng.integers(1, 6))
        rows.append(llava(question, answer, images=images or None, id=f"s{index}"))
    return files.json(rows).path


def recipe_of(folder: Path, model: Any, path: str, **changes: Any) -> dict[str, Any]:
    """A recipe as a dictionary: float32, everything trains, four steps of four samples."""
    recipe: dict[str, Any] = {
        "stage": "finetune",
        "model": model,
        "data": {"path": path, "max_length": 400, "workers": 0, **changes.pop("data", {})},
        "output_dir": str(folder),
        "optimizer": {"lr": 1e-3, **changes.pop("optimizer", {})},
        "batch": {"global_batch_size": 4, "per_device_batch_size": 4, **changes.pop("batch", {})},
        "steps": 4,
        "precision": "fp32",
        "gradient_checkpointing": False,
        "checkpoint": {"save_steps": 100, **changes.pop("checkpoint", {})},
    }
    return {**recipe, **changes}


def write_recipe(path: Path, recipe: dict[str, Any]) -> Path:
    """A recipe as a YAML file."""
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def train_in_processes(recipe: Path, count: int = 2) -> None:
    """`cumo train` under torchrun, on the CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "-m", "cumo", "train", str(recipe)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
