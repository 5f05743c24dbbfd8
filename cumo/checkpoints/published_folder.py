# SPDX-License-Identifier: Apache-2.0
"""Open folders that the published code writes (whole models, first stages, LoRA adapters) as one set of tensors.

Tensors keep their published names and are read when they are looked up. A folder may hold

- a whole model: shards, .safetensors or .bin;
- beside them, `clip.bin` and `mm_projector.bin`, as after the second stage;
- `mm_projector.bin` alone, as after the first stage: the language model comes from a base, the vision encoder from the
  folder that `mm_vision_tower` names;
- a LoRA adapter with `non_lora_trainables.bin`: all else comes from a base, into which the adapter is merged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from cumo.checkpoints.files import Weights, has_weights, open_file, open_folder, read_json
from cumo.checkpoints.published_config import encoder_folder, is_published

TOWER = "model.vision_tower."
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_LORA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")


class Published(NamedTuple):
    """Configuration and tensors of a published checkpoint."""

    config: dict[str, Any]
    """Content of its config.json."""
    tensors: Mapping[str, Tensor]
    """Tensors under their published names, experts apart."""
    folder: Path


class Merged(Mapping[str, Tensor]):
    """`base` with W + scale B A in place of each W that the adapter has A and B for, computed on look-up."""

    def __init__(self, base: Weights, adapter: Weights, pairs: Mapping[str, Mapping[str, str]], scale: float) -> None:
        self._base, self._adapter, self._pairs, self._scale = base, adapter, pairs, scale

    def __getitem__(self, name: str) -> Tensor:
        weight = self._base[name]
        if name not in self._pairs:
            return weight
        a, b = (self._adapter[self._pairs[name][side]].float() for side in "AB")
        if not (a.dim() == b.dim() == 2 and b.shape[1] == a.shape[0] and (b.shape[0], a.shape[1]) == weight.shape):
            raise ValueError(
                f"{self._adapter.file_of(self._pairs[name]['A'])}: expected A and B whose product is {name}, of shape "
                f"{[*weight.shape]}, got {[*a.shape]} and {[*b.shape]}"
            )
        return (weight.float() + self._scale * (b @ a)).to(weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)


def read_config(folder: Path) -> dict[str, Any]:
    """Read a folder's config.json.

    Raises:
        ValueError: `folder` has no config.json, or it is not JSON.
    """
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"{path}: expected the configuration of a model, found no such file")
    return read_json(path)


def open_published(folder: Path, base: Path | None = None) -> Published:
    """Open a folder of the published layout.

    Args:
        folder: a folder of one of the kinds that the module's docstring lists.
        base: folder of the model that a LoRA adapter was trained on, or of the language model of a first stage; in the
            published layout or, for a first stage, the plain language model.

    Raises:
        ValueError: `folder` is not of the published layout, is incomplete, or holds damaged files.
    """
    config = read_config(folder)
    if not is_published(config):
        raise ValueError(
            f"{folder}: expected model_type llava_mistral or llava_mixtral, got {config.get('model_type')!r}"
        )
    if (folder / "adapter_config.json").is_file():
        return Published(config, _merge_lora(folder, _require_base(folder, base)), folder)
    tensors = open_folder(folder) if has_weights(folder) else _of_base(folder, base)
    return Published(config, _with_parts(folder, config, tensors), folder)


def _require_base(folder: Path, base: Path | None) -> Path:
    if base is None:
        raise ValueError(
            f"model_base: expected the folder of the model that {folder} builds on, as it holds no language model; "
            "got None"
        )
    return base


def _of_base(folder: Path, base: Path | None) -> Weights:
    """Open the language model in the folder of the base."""
    return open_folder(_require_base(folder, base))


def _with_parts(folder: Path, config: Mapping[str, Any], tensors: Weights) -> Weights:
    """Add to `tensors` those of clip.bin, mm_projector.bin and the vision encoder's folder."""
    if (folder / "mm_projector.bin").is_file():
        tensors = tensors.joined(open_file(folder / "mm_projector.bin"))
    if (folder / "clip.bin").is_file():
        tower = open_file(folder / "clip.bin")
        tensors = tensors.joined(tower.renamed({name: TOWER + name for name in tower}))
    if not any(name.startswith(TOWER) for name in tensors):
        tensors = tensors.joined(_encoder_weights(folder, str(config.get("mm_vision_tower"))))
    return tensors


def _encoder_weights(folder: Path, name: str) -> Weights:
    """Open the tensors of a CLIP in transformers' form, without those that the published model leaves out."""
    encoder = encoder_folder(name, folder)
    if encoder is None or not has_weights(encoder):
        raise ValueError(
            f"{folder}: expected the weights of the vision encoder, in it, in clip.bin or in a folder "
            f"mm_vision_tower={name!r}; found none"
        )
    weights = open_folder(encoder)
    unused = ("vision_model.post_layernorm.", "vision_model.embeddings.position_ids")
    names = [key for key in weights if key.startswith("vision_model.") and not key.startswith(unused)]
    return weights.renamed({key: TOWER + key for key in names})


def _merge_lora(folder: Path, base: Path) -> Mapping[str, Tensor]:
    """Return the base's tensors, replaced by those of non_lora_trainables.bin and merged with the adapter."""
    tensors = open_published(base).tensors if is_published(read_config(base)) else open_folder(base)
    if not isinstance(tensors, Weights):
        raise ValueError(f"model_base: expected a model rather than another adapter, got {base}")
    trained = open_file(folder / "non_lora_trainables.bin")
    trained = trained.renamed({name: _in_model(name) for name in trained})
    tensors = trained.joined(tensors.renamed({name: name for name in tensors if name not in trained}))
    file = next((folder / name for name in ADAPTER_FILES if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"{folder}: expected {' or '.join(ADAPTER_FILES)} beside adapter_config.json, found neither")
    adapter = open_file(file)
    return Merged(tensors, adapter, lora_pairs(file, adapter, tensors), lora_scale(folder / "adapter_config.json"))


def lora_pairs(file: Path, adapter: Weights, tensors: Weights) -> dict[str, dict[str, str]]:
    """Return the names of A and B in an adapter's file, for each weight in `tensors` that has them.

    Raises:
        ValueError: the file holds other tensors.
    """
    pairs: dict[str, dict[str, str]] = {}
    for name in adapter:
        match = _LORA_KEY.fullmatch(_in_model(name))
        if match is None:
            raise ValueError(f"{file}: expected names that end in lora_A.weight or lora_B.weight, got {name}")
        pairs.setdefault(match["module"] + ".weight", {})[match["side"]] = name
    faults = sorted(name for name, pair in pairs.items() if name not in tensors or len(pair) < 2)
    if faults:
        raise ValueError(f"{file}: expected an A and a B for weights of the model, got others for {faults}")
    return pairs


def _in_model(name: str) -> str:
    """Return the model's name of a tensor that PEFT wrapped."""
    return name.removeprefix("base_model.").removeprefix("model.") if name.startswith("base_model.model.") else name


def lora_scale(path: Path) -> float:
    """Return the factor of B A (LoRA, arXiv 2106.09685, 4.1; rank-stabilised: arXiv 2312.03732)."""
    options = read_json(path)
    for key in ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern"):
        if options.get(key):
            raise ValueError(f"{path}: {key}: expected it off or empty, got {options[key]!r}")
    numbers = {key: options.get(key) for key in ("r", "lora_alpha")}
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
            raise ValueError(f"{path}: {key}: expected a positive number, got {value!r}")
    rank = float(options["r"])
    return float(options["lora_alpha"]) / (rank**0.5 if options.get("use_rslora") else rank)
