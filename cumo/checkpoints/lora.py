# SPDX-License-Identifier: Apache-2.0
"""Folders of LoRA adapters (arXiv 2106.09685) as `cumo train` writes them: the trained weights, without the base.

`adapter_config.json` and `adapter_model.safetensors` have PEFT's format. `trained.safetensors` holds the parameters
that were trained in full (encoder, connector, routers), under their names in the model. `config.json` is the model's.
All other weights come from the base, whose folder `adapter_config.json` names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from cumo.checkpoints.files import Weights, open_file, open_folder, read_json
from cumo.checkpoints.published_folder import Merged, lora_pairs, lora_scale, read_config

CONFIG, ADAPTER, TRAINED = "adapter_config.json", "adapter_model.safetensors", "trained.safetensors"
_PREFIX, _NAME = "base_model.model.", ".default."


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds such an adapter."""
    return (folder / CONFIG).is_file() and (folder / TRAINED).is_file()


def write_adapter(folder: Path, trained: Mapping[str, Tensor], peft_config: Any) -> None:
    """Write the trained weights into an existing folder.

    Args:
        folder: the existing folder.
        trained: parameters under their names in the model; those of the adapter under the names that PEFT gives them.
        peft_config: a `LoraConfig` with `base_model_name_or_path`.
    """
    adapter = {name: tensor for name, tensor in trained.items() if ".lora_" in name}
    rest = {name: tensor for name, tensor in trained.items() if name not in adapter}
    stored = {
        _PREFIX + name.replace(_NAME, "."): tensor.detach().cpu().contiguous() for name, tensor in adapter.items()
    }
    save_file(stored, folder / ADAPTER, metadata={"format": "pt"})
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in rest.items()}
    save_file(whole, folder / TRAINED, metadata={"format": "pt"})
    peft_config.save_pretrained(folder)


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """Return what `write_adapter` was given as `trained`.

    Raises:
        ValueError: a file is absent or damaged.
    """
    adapter, rest = open_file(folder / ADAPTER), open_file(folder / TRAINED)
    names = {name: name.removeprefix(_PREFIX) for name in adapter}
    injected = {name: f"{inner.removesuffix('.weight')}{_NAME}weight" for name, inner in names.items()}
    return {**{injected[name]: adapter[name] for name in adapter}, **dict(rest)}


def base_of(folder: Path, base: Path | None = None) -> Path:
    """Return the base's folder: `base`, or the one that the adapter names.

    Raises:
        ValueError: the base's folder does not exist.
    """
    found = base or Path(str(read_json(folder / CONFIG).get("base_model_name_or_path")))
    if not (found / "config.json").is_file():
        raise ValueError(f"model_base: expected the folder of the model that {folder} builds on, got {str(found)!r}")
    return found


def open_adapter(folder: Path, base: Path | None = None) -> Mapping[str, Tensor]:
    """Return the merged tensors of base and adapter, under our names. Each is computed when it is looked up.

    Args:
        folder: a folder that `write_adapter` wrote.
        base: folder of the base, in this package's layout, to use instead of the one that the adapter names.

    Raises:
        ValueError: a folder is incomplete or damaged, or adapter and base do not fit.
    """
    base = base_of(folder, base)
    if read_config(base).get("model_type") != read_config(folder).get("model_type"):
        raise ValueError(f"model_base: expected a model of this package's layout, got {base}; convert it first")
    tensors: Weights = open_folder(base)
    rest = open_file(folder / TRAINED)
    if unknown := sorted(name for name in rest if name not in tensors):
        raise ValueError(f"{folder / TRAINED}: expected tensors of {base}, got others: {unknown}")
    tensors = rest.joined(tensors.renamed({name: name for name in tensors if name not in rest}))
    adapter = open_file(folder / ADAPTER)
    pairs = lora_pairs(folder / ADAPTER, adapter, tensors)
    return Merged(tensors, adapter, pairs, lora_scale(folder / CONFIG))
