# SPDX-License-Identifier: Apache-2.0
"""`from_pretrained` of both layouts: that of this package, which is transformers' own way, and the published one."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter

from cumo.checkpoints.files import INDEX_SUFFIX, WEIGHT_FILES, read_index, reading
from cumo.checkpoints.lora import is_adapter, open_adapter
from cumo.checkpoints.published import native_name
from cumo.checkpoints.published_config import is_published
from cumo.checkpoints.published_folder import open_published
from cumo.config import CuMoConfig

ADAPTER = "adapter"
NUMBERS_PER_BYTE = 4  # two where weights of four bits are packed, and some room
SMALL = 100_000_000  # numbers that fit anywhere
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
# What of a repository a model is made of
MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "tokenizer.model")


def _stacked(source: str, target: str) -> WeightConverter:
    return WeightConverter(source_patterns=[source], target_patterns=target, operations=[MergeModulelist(dim=0)])


# Experts apart -> stacked. Used while loading the published layout; no name of our own layout matches. Each pattern
# names the tensor to its end, since a weight's name is the beginning of its bias's.
register_checkpoint_conversion_mapping(
    "CuMoForConditionalGeneration",
    [
        _stacked(f"{module}.experts.*.{layer}.{kind}", f"{module}.{projection}{suffix}")
        for module, layers in (("mlp", ("fc1", "fc2")), ("connector.projection", ("0", "2")))
        for layer, projection in zip(layers, ("up_proj", "down_proj"), strict=True)
        for kind, suffix in (("weight", ""), ("bias", "_bias"))
    ],
    overwrite=True,
)


class LoadsBothLayouts(PreTrainedModel):
    """A model whose `from_pretrained` reads the published layout too, and never initialises what is missing."""

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
                whole models, first stages (`clip.bin`, `mm_projector.bin`), LoRA adapters (merged while loading).
            config: in place of that of the folder.
            model_base: the model that a published adapter or first stage builds on; for an adapter of this package, in
                place of the one that it names.
            output_loading_info: return also the names that did not fit, rather than raise.

        Raises:
            ValueError: tensors are missing, left over or of another shape than the configuration says; or files are
                absent or damaged.
        """
        name = pretrained_model_name_or_path
        layout = CuMoConfig.model_type
        options: dict[str, Any] = {}
        if name is not None:
            hub = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
            with reading(name, "the configuration of a model"):
                raw, _ = CuMoConfig.get_config_dict(name, **hub)
            folder = Path(name)
            if is_published(raw):
                layout = raw["model_type"]
                folder = _local(name, hub)
                config, options = _published_arguments(folder, config, model_base)
            elif is_adapter(folder):
                layout = ADAPTER
                config = CuMoConfig.from_pretrained(folder) if config is None else config
                options = {"state_dict": dict(open_adapter(folder, None if model_base is None else Path(model_base)))}
            if options:
                kwargs = {key: value for key, value in kwargs.items() if key not in HUB_OPTIONS}
                name = None
        tolerant = kwargs.pop("ignore_mismatched_sizes", False)
        if name is None or os.path.isdir(name):
            tensors = options.get("state_dict", {})
            stored = sum(tensor.nbytes for tensor in tensors.values()) if name is None else _weight_bytes(Path(name))
            if stored and not (tolerant or output_loading_info):
                _check_size(cls, config or CuMoConfig.from_pretrained(name), stored, pretrained_model_name_or_path)
        with reading(pretrained_model_name_or_path, "a checkpoint of CuMo"):
            loaded: Any = super().from_pretrained(
                name,
                *model_args,
                config=config,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
                **kwargs,
            )
        model, info = loaded
        if layout != CuMoConfig.model_type:
            model._weight_conversions = []  # what is saved is of our layout
            model.config.name_or_path = str(pretrained_model_name_or_path)
            if (folder / "generation_config.json").is_file():
                with reading(folder / "generation_config.json", "a generation configuration"):
                    model.generation_config = GenerationConfig.from_pretrained(folder)
        if output_loading_info:
            return model, info
        _check(info, layout, str(pretrained_model_name_or_path), tolerant)
        return model

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """As in transformers; always in the layout of this package."""
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, **kwargs)


def _local(name: str | os.PathLike[str], hub: dict[str, Any]) -> Path:
    """A folder as it is, a repository of the hub downloaded."""
    if os.path.isdir(name):
        return Path(name)
    return Path(snapshot_download(str(name), allow_patterns=list(MODEL_FILES), **hub))


def _published_arguments(folder: Path, config: Any, base: Any) -> tuple[Any, dict[str, Any]]:
    """Configuration and tensors for transformers, under our names, experts yet apart."""
    published = open_published(folder, None if base is None else Path(base))
    if config is None:
        config = CuMoConfig.from_pretrained(folder)
    state_dict = {native_name(name): published.tensors[name] for name in published.tensors}
    return config, {"state_dict": state_dict}


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
