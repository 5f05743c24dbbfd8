# SPDX-License-Identifier: Apache-2.0
"""`from_pretrained` of both layouts: that of this package, which is transformers' own way, and the published one."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from huggingface_hub import snapshot_download
from transformers import GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter

from cumo.checkpoints.files import INDEX_SUFFIX, WEIGHT_FILES, open_folder, read_index, reading
from cumo.checkpoints.lora import is_adapter, open_adapter
from cumo.checkpoints.published import native_name
from cumo.checkpoints.published_config import is_published
from cumo.checkpoints.published_folder import open_published
from cumo.config import HUB_OPTIONS, CuMoConfig

ADAPTER = "adapter"
NUMBERS_PER_BYTE = 4  # two where weights of four bits are packed, and some room
SMALL = 100_000_000  # numbers that fit anywhere
# What of a repository a model is made of
MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "tokenizer.model")


def _stacked(source: str, target: str) -> WeightConverter:
    return WeightConverter(source_patterns=[source], target_patterns=target, operations=[MergeModulelist(dim=0)])


# Experts apart -> stacked. Used while loading the published layout; no name of our own layout matches. Each pattern
# names the tensor to its end, since a weight's name is the beginning of its bias's.
_ENCODER: list[Any] = [
    _stacked(f"mlp.experts.*.{layer}.{kind}", f"mlp.{projection}{suffix}")
    for layer, projection in (("fc1", "up_proj"), ("fc2", "down_proj"))
    for kind, suffix in (("weight", ""), ("bias", "_bias"))
]
_CONNECTOR: list[Any] = [
    _stacked(f"connector.projection.experts.*.{layer}.{kind}", f"connector.projection.{projection}{suffix}")
    for layer, projection in (("0", "up_proj"), ("2", "down_proj"))
    for kind, suffix in (("weight", ""), ("bias", "_bias"))
]
register_checkpoint_conversion_mapping("CuMoForConditionalGeneration", [*_ENCODER, *_CONNECTOR], overwrite=True)
register_checkpoint_conversion_mapping("CuMoVisionModel", _ENCODER, overwrite=True)


class _Source(NamedTuple):
    """The source of a model."""

    layout: str
    tensors: dict[str, Any] | None
    """Tensors by our names, where transformers cannot read them itself."""
    folder: Path | None
    """Folder of the files, if the model is made of `tensors`."""


class LoadsBothLayouts(PreTrainedModel):
    """A model whose `from_pretrained` reads the published layout too, and never initialises what is missing."""

    _part: ClassVar[str] = ""
    """Prefix of its tensors' names in the whole model."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,
        config: Any = None,
        model_base: str | os.PathLike[str] | None = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a model; see transformers for what is not said here.

        Args:
            pretrained_model_name_or_path: folder or name on the hub, of this package's layout or the published one:
                whole models, first stages (`clip.bin`, `mm_projector.bin`), LoRA adapters (merged while loading). An
                encoder takes its part of a whole model.
            config: in place of that of the folder.
            model_base: the model that a published adapter or first stage builds on; for an adapter of this package, in
                place of the one that it names.
            output_loading_info: return also the names that did not fit, rather than raise.

        Raises:
            ValueError: tensors are missing, left over or of another shape than the configuration says; or files are
                absent or damaged.
        """
        name = pretrained_model_name_or_path
        config_class: Any = cls.config_class
        source = _Source(CuMoConfig.model_type, None, None)
        if name is not None:
            hub = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
            source = _find(name, hub, model_base, bool(cls._part))
        tolerant = kwargs.pop("ignore_mismatched_sizes", False)
        if source.tensors is not None:
            tensors = {
                key.removeprefix(cls._part): tensor
                for key, tensor in source.tensors.items()
                if key.startswith(cls._part)
            }
            kwargs = {key: value for key, value in kwargs.items() if key not in HUB_OPTIONS} | {"state_dict": tensors}
            config = config_class.from_pretrained(source.folder) if config is None else config
            stored = sum(tensor.nbytes for tensor in tensors.values())
        else:
            stored = _weight_bytes(Path(name)) if name is not None and os.path.isdir(name) else 0
        if stored and not (tolerant or output_loading_info):
            _check_size(cls, config or config_class.from_pretrained(name), stored, name)
        with reading(name, "a checkpoint of CuMo"):
            loaded: Any = super().from_pretrained(
                None if source.tensors is not None else name,
                *model_args,
                config=config,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **kwargs,
            )
        model, info = loaded
        if source.folder is not None:
            _tell_source(model, str(name), source.folder)
        if output_loading_info:
            return model, info
        _check(info, source.layout, str(name), tolerant)
        return model

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Save as in transformers, always in the layout of this package."""
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, **kwargs)


def _find(name: str | os.PathLike[str], hub: dict[str, Any], base: Any, part: bool) -> _Source:
    """Find a model, or a part of one, in a folder or repository; tensors are read as they are used."""
    with reading(name, "the configuration of a model"):
        raw, _ = CuMoConfig.get_config_dict(name, **hub)
    folder, base = Path(name), None if base is None else Path(base)
    if is_published(raw):
        folder = _local(name, hub)
        published = open_published(folder, base)
        tensors = {native_name(key): published.tensors[key] for key in published.tensors}
        return _Source(raw["model_type"], tensors, folder)
    if is_adapter(folder):
        return _Source(ADAPTER, dict(open_adapter(folder, base)), folder)
    if part and raw.get("model_type") == CuMoConfig.model_type:
        folder = _local(name, hub)
        return _Source(CuMoConfig.model_type, dict(open_folder(folder)), folder)
    return _Source(CuMoConfig.model_type, None, None)


def _tell_source(model: Any, name: str, folder: Path) -> None:
    """Let a model that was loaded from ready tensors look like one that transformers has read."""
    model._weight_conversions = []  # what is saved is of our layout
    model.config.name_or_path = name
    if model.can_generate() and (folder / "generation_config.json").is_file():
        with reading(folder / "generation_config.json", "a generation configuration"):
            model.generation_config = GenerationConfig.from_pretrained(folder)


def _local(name: str | os.PathLike[str], hub: dict[str, Any]) -> Path:
    """A folder as it is, a repository of the hub downloaded."""
    if os.path.isdir(name):
        return Path(name)
    return Path(snapshot_download(str(name), allow_patterns=list(MODEL_FILES), **hub))


def _weight_bytes(folder: Path) -> int:
    for index in (folder / (file + INDEX_SUFFIX) for file in WEIGHT_FILES):
        if index.is_file():
            read_index(index)
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))


def _check_size(cls: Any, config: Any, stored: int, name: Any) -> None:
    """Raise where a configuration describes a model that is larger by far than its weights.

    What is missing or of another shape is told once all is loaded; until then it would take memory without bound.
    """
    with reading(name, "the configuration of a model"), torch.device("meta"):
        numbers = sum(parameter.numel() for parameter in cls(copy.deepcopy(config)).parameters())
    if numbers > NUMBERS_PER_BYTE * stored + SMALL:
        raise ValueError(
            f"{name}: expected the tensors of its configuration, which describes {numbers} numbers, got {stored} bytes"
        )


def _check(info: dict[str, Any], layout: str, name: str, tolerant: bool) -> None:
    """Raise unless every tensor found its place."""
    faults = [f"{kind} {sorted(info[f'{kind}_keys'])}" for kind in ("missing", "unexpected") if info[f"{kind}_keys"]]
    if info["mismatched_keys"] and not tolerant:
        shapes = [f"{key}: {[*found]} for {[*expected]}" for key, found, expected in sorted(info["mismatched_keys"])]
        faults.append(f"of another shape (checkpoint for model) {shapes}")
    if info.get("error_msgs"):
        faults.append(str(info["error_msgs"]))
    if faults:
        raise ValueError(
            f"{name}: expected the tensors of its configuration in the layout {layout!r}, got {'; '.join(faults)}"
        )
