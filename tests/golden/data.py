# SPDX-License-Identifier: Apache-2.0
"""Where the reference data of the published implementation lie. Its sizes stand in the files: never in a test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

FOLDER = Path(os.environ.get("CUMO_GOLDEN_DIR") or Path(__file__).resolve().parents[3] / "shared" / "golden")


def golden(name: str) -> Path:
    """Path of a file or folder of the reference data; skips the test where there is none."""
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"no reference data {name} in {FOLDER}; CUMO_GOLDEN_DIR names the folder")
    return path


def load_tensors(name: str, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    with safe_open(golden(name), framework="pt", device=str(device)) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
