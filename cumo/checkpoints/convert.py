# SPDX-License-Identifier: Apache-2.0
"""Convert checkpoints between the published layout and ours, in a stream: at most one shard is in memory.

`cumo convert` on the command line. The target is written aside and renamed at the end, after every tensor was checked
against the model that the configuration describes.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cumo.checkpoints.files import MAX_SHARD_BYTES, open_folder, reading, write_json, write_shards, written_aside
from cumo.checkpoints.lora import is_adapter, open_adapter
from cumo.checkpoints.published import native_tensors, published_tensors
from cumo.checkpoints.published_config import CLIP_NAME, is_published, published_fields
from cumo.checkpoints.published_folder import open_published, read_config
from cumo.config import CLIP_VIT_L_14_336, CuMoConfig
from cumo.models.cumo import CuMoForConditionalGeneration
from cumo.models.processor import CuMoProcessor

NATIVE, PUBLISHED = "native", "published"
TOWER_FOLDER = "vision_tower"
# Files beside the weights that are the same in both layouts
COMPANIONS = ("generation_config.json", "tokenizer.model")
PROCESSOR = "processor_config.json"


def open_checkpoint(
    folder: Path, base: Path | None = None, config: CuMoConfig | None = None
) -> tuple[CuMoConfig, Iterator[tuple[str, Tensor]]]:
    """Open a checkpoint of either layout. Return its configuration, and its tensors as a stream under our names.

    Args:
        folder: the checkpoint.
        base: see `open_published`.
        config: configuration to use instead of the checkpoint's own.

    Raises:
        ValueError: `folder` is not a checkpoint, or is incomplete or damaged.
    """
    raw = read_config(folder)
    config = CuMoConfig.from_pretrained(folder) if config is None else config
    if is_adapter(folder):
        merged = open_adapter(folder, base)
        return config, ((name, merged[name]) for name in merged)
    if is_published(raw):
        return config, native_tensors(open_published(folder, base).tensors)
    if raw.get("model_type") != CuMoConfig.model_type:
        raise ValueError(
            f"{folder}: expected model_type cumo, llava_mistral or llava_mixtral, got {raw.get('model_type')!r}"
        )
    weights = open_folder(folder)
    return config, ((name, weights[name]) for name in weights)


def checked(tensors: Iterable[tuple[str, Tensor]], config: CuMoConfig, source: Path) -> Iterator[tuple[str, Tensor]]:
    """Pass on `tensors`, and raise at their end unless they are those of the model that `config` describes.

    Raises:
        ValueError: tensors are missing, left over, or of other shapes. The message names the layout assumed for
            `source`.
    """
    layout = read_config(source).get("model_type")
    try:
        yield from _checked(tensors, config)
    except ValueError as error:
        raise ValueError(f"{source}: in the layout {layout!r}: {error}") from error


def _checked(tensors: Iterable[tuple[str, Tensor]], config: CuMoConfig) -> Iterator[tuple[str, Tensor]]:
    with reading("its configuration", "that of a model"), torch.device("meta"):
        model = CuMoForConditionalGeneration(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    missing = set(expected) - set(getattr(model, "all_tied_weights_keys", None) or ())
    unexpected, mismatched = [], []
    for name, tensor in tensors:
        missing.discard(name)
        if name not in expected:
            unexpected.append(name)
        elif tensor.shape != expected[name]:
            mismatched.append(f"{name}: {[*tensor.shape]} for {[*expected[name]]}")
        yield name, tensor
    faults = {"missing": sorted(missing), "unexpected": unexpected, "of another shape": mismatched}
    if any(faults.values()):
        told = "; ".join(f"{kind} {names}" for kind, names in faults.items() if names)
        raise ValueError(f"expected the tensors of the model that its configuration describes, got {told}")


def write_native(target: Path, config: CuMoConfig, tensors: Iterable[tuple[str, Tensor]], **options: Any) -> None:
    """Write config.json and shards of our layout into an existing folder; `options` are those of `write_shards`."""
    write_shards(target, tensors, **options)
    config.architectures = [CuMoForConditionalGeneration.__name__]
    config.save_pretrained(target)


def copy_companions(source: Path, target: Path) -> None:
    """Copy the files beside the weights and a processor; if the source has none, make one from `tokenizer.model`."""
    _copy_files(source, target)
    if any((source / name).is_file() for name in (PROCESSOR, "tokenizer.model")):
        CuMoProcessor.from_pretrained(source).save_pretrained(target)


def convert_to_native(
    source: Path, target: Path, base: Path | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Convert a checkpoint of the published layout to ours. LoRA adapters are merged, first stages completed.

    Args:
        source: see `cumo.checkpoints.published_folder`.
        target: a folder that does not exist yet.
        base: folder of the model that an adapter or a first stage builds on.
        max_shard_bytes: see `write_shards`.

    Raises:
        ValueError: files are absent or damaged, or tensors do not fit the configuration. `target` is not left behind.

    Examples:
        >>> from pathlib import Path
        >>> from cumo import CuMoForConditionalGeneration
        >>> convert_to_published(Path("checkpoint"), Path("published"))
        >>> convert_to_native(Path("published"), Path("native"))
        >>> one, other = (CuMoForConditionalGeneration.from_pretrained(name) for name in ("published", "native"))
        >>> all(bool((one.state_dict()[name] == tensor).all()) for name, tensor in other.state_dict().items())
        True
    """
    config, tensors = open_checkpoint(source, base)
    with written_aside(target) as folder:
        write_native(folder, config, checked(tensors, config, source), max_shard_bytes=max_shard_bytes)
        copy_companions(source, folder)


def convert_to_published(source: Path, target: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """The inverse of `convert_to_native`, bit for bit.

    An encoder other than CLIP ViT-L/14-336 is described in `target/vision_tower`. The published layout has no processor
    but its `tokenizer.model`; one is written where it would lose something.

    Raises:
        ValueError: see `convert_to_native`, or the published layout cannot represent the model.
    """
    config = CuMoConfig.from_pretrained(source)
    weights = open_folder(source)
    encoder = config.vision_config.encoder_config
    built_in = all(getattr(encoder, key) == value for key, value in CLIP_VIT_L_14_336.items())
    fields = published_fields(config, CLIP_NAME if built_in else TOWER_FOLDER)
    for _ in checked(((name, weights[name]) for name in weights), config, source):
        pass  # tensors are mapped, not read: this checks names and shapes
    with written_aside(target) as folder:
        write_shards(folder, published_tensors(weights), max_shard_bytes=max_shard_bytes)
        write_json(folder / "config.json", fields)
        if not built_in:
            (folder / TOWER_FOLDER).mkdir()
            encoder.save_pretrained(folder / TOWER_FOLDER)
        _copy_files(source, folder)
        if (source / PROCESSOR).is_file():
            processor = CuMoProcessor.from_pretrained(source)
            if not _is_implied(processor, folder):
                processor.save_pretrained(folder)


def _copy_files(source: Path, target: Path) -> None:
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _is_implied(processor: Any, folder: Path) -> bool:
    """Whether `processor` equals the one that is made from a published folder."""
    if not (folder / "tokenizer.model").is_file():
        return False
    made = CuMoProcessor.from_pretrained(folder)
    return bool(made.to_dict() == processor.to_dict() and made.chat_template == processor.chat_template)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `cumo convert`."""
    parser.add_argument("source", type=Path, help="folder of a checkpoint")
    parser.add_argument("target", type=Path, help="folder to write, which must not exist yet")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--to", choices=(NATIVE, PUBLISHED), help="layout of the target")
    what.add_argument("--merge-lora", action="store_true", help="an adapter and its base into one model of our layout")
    parser.add_argument("--base", type=Path, help="model that a LoRA adapter or a first stage builds on")
    parser.add_argument(
        "--max-shard-gb", type=float, default=MAX_SHARD_BYTES / 1e9, help="size of a shard, and about the memory needed"
    )


def run(arguments: argparse.Namespace) -> None:
    """Run `cumo convert`."""
    size = int(arguments.max_shard_gb * 1e9)
    if arguments.merge_lora:
        if not (arguments.source / "adapter_config.json").is_file():
            raise ValueError(
                f"source: expected a folder with adapter_config.json for --merge-lora, got {arguments.source}"
            )
        arguments.to = NATIVE
    if arguments.to == NATIVE:
        convert_to_native(arguments.source, arguments.target, arguments.base, size)
    else:
        convert_to_published(arguments.source, arguments.target, size)
    print(f"{arguments.target}: written in the {arguments.to} layout")
