# SPDX-License-Identifier: Apache-2.0
"""Tensors in files: read one at a time, mapped rather than loaded; written aside in shards, then renamed."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

# Searched in this order, as transformers does.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_SUFFIX = ".index.json"
# A shard is in memory while it is filled. 4 GB hold the largest stacked tensor of Mixtral-8x7B (1.9 GB in bfloat16).
MAX_SHARD_BYTES = 4 * 10**9


class Weights(Mapping[str, Tensor]):
    """Tensors in files, by name. Each is read when it is looked up.

    Nothing is cached: a tensor maps its file for as long as it lives, so memory holds only the tensors in use.

    Args:
        files: tensor name -> file that holds it.
        stored_names: tensor name -> its name within the file, where that is another.
    """

    def __init__(self, files: Mapping[str, Path], stored_names: Mapping[str, str] | None = None) -> None:
        self._files = dict(files)
        self._stored_names = dict(stored_names or {})

    def __getitem__(self, name: str) -> Tensor:
        return _read(self._files[name], self._stored_names.get(name, name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def file_of(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        return self._files[name]

    def renamed(self, names: Mapping[str, str]) -> Weights:
        """Return the tensors under new names. `names` maps old to new names; other tensors are left out."""
        return Weights(
            {new: self._files[old] for old, new in names.items()},
            {new: self._stored_names.get(old, old) for old, new in names.items()},
        )

    def joined(self, other: Weights) -> Weights:
        """Return the union of both.

        Raises:
            ValueError: a name is in both, for different tensors.
        """
        for name in self.keys() & other.keys():
            if not torch.equal(self[name], other[name]):
                raise ValueError(
                    f"{name}: expected one value, got different ones in {self.file_of(name)} and {other.file_of(name)}"
                )
        return Weights({**other._files, **self._files}, {**other._stored_names, **self._stored_names})


def _is_safetensors(path: Path) -> bool:
    return path.suffix == ".safetensors"


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn errors of the readers into errors that name the file."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, OSError, KeyError, TypeError) as error:
        if isinstance(error, FileNotFoundError):
            raise ValueError(f"{path}: expected a file of tensors, found none") from error
        raise ValueError(
            f"{path}: expected a whole file of tensors, got a truncated or damaged one: {error}"
        ) from error


@contextmanager
def reading(name: object, what: str) -> Iterator[None]:
    """Turn errors of other packages' readers into a `ValueError` that names what is read.

    Args:
        name: the file, folder or repository.
        what: what it was expected to be.

    Raises:
        ValueError: `name` is not what was expected.
        OSError: `name` cannot be read.
    """
    try:
        yield
    except (OSError, MemoryError, ImportError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # a field of a wrong type can lead to any error
        told = " ".join(str(error)[:2000].split())
        if isinstance(error, ValueError) and str(name) in told:
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{name}: expected {what}, got {kind}{told}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file.

    Raises:
        ValueError: `path` does not exist or holds no JSON object.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"{path}: expected a JSON file, found none") from error
    except RecursionError as error:
        raise ValueError(f"{path}: expected JSON, got what is nested too deep") from error
    except ValueError as error:  # includes bytes that are not UTF-8
        raise ValueError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object, got {type(content).__name__}")
    return content


def _load_bin(path: Path) -> dict[str, Tensor]:
    with _naming(path):
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path}: expected a dictionary of tensors, got {type(tensors).__name__}")
    return tensors


def _read(path: Path, name: str) -> Tensor:
    if not _is_safetensors(path):
        return _load_bin(path)[name]
    with _naming(path), safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


def tensor_names(path: Path) -> list[str]:
    """List the names of the tensors in a .safetensors or .bin file.

    Raises:
        ValueError: `path` does not exist or is damaged.
    """
    if not _is_safetensors(path):
        return list(_load_bin(path))
    with _naming(path), safe_open(path, framework="pt") as file:
        return list(file.keys())


def open_file(path: Path) -> Weights:
    """Open the tensors of one file.

    Raises:
        ValueError: `path` does not exist or is damaged.
    """
    return Weights(dict.fromkeys(tensor_names(path), path))


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weights under one of transformers' names, whole or sharded."""
    return any((folder / (name + suffix)).is_file() for name in WEIGHT_FILES for suffix in ("", INDEX_SUFFIX))


def open_folder(folder: Path) -> Weights:
    """Open the weights of a folder as transformers writes it: one file, or shards with an index (.safetensors or .bin).

    Raises:
        ValueError: `folder` holds no weights; a shard is absent or damaged, or holds other tensors than its index says.
    """
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return open_file(folder / name)
        index = folder / (name + INDEX_SUFFIX)
        if index.is_file():
            return _open_shards(index)
    raise ValueError(f"{folder}: expected {' or '.join(WEIGHT_FILES)}, whole or with an index, found neither")


def _is_shard(name: object) -> bool:
    """Whether `name` is the name of a file, without any folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\\", "\0"} & set(name)


def read_index(index: Path) -> dict[str, str]:
    """Read the file of each tensor from an index. The files must lie beside it.

    Raises:
        ValueError: `index` does not map tensors to names of files beside it.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(_is_shard(shard) for shard in weight_map.values()):
        raise ValueError(f"{index}: expected a weight_map from tensors to files beside it, got another")
    return weight_map


def _open_shards(index: Path) -> Weights:
    weight_map = read_index(index)
    wanted: dict[Path, set[str]] = {}
    for name, shard in weight_map.items():
        wanted.setdefault(index.parent / shard, set()).add(name)
    for shard_path, names in sorted(wanted.items()):
        found = set(tensor_names(shard_path))
        if found != names:
            raise ValueError(
                f"{shard_path}: expected the tensors that {index.name} lists; missing {sorted(names - found)}, "
                f"unexpected {sorted(found - names)}"
            )
    return Weights({name: index.parent / shard for name, shard in weight_map.items()})


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """Yield a folder to write into. It becomes `folder` at the end, or is removed if an error is raised.

    Raises:
        ValueError: `folder` exists already.
    """
    if folder.exists():
        raise ValueError(f"{folder}: expected a folder that does not exist yet, found one")
    aside = folder.with_name(f".{folder.name}.incomplete")
    if aside.exists():  # left behind by a killed process
        shutil.rmtree(aside)
    aside.mkdir(parents=True)
    try:
        yield aside
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def write_shards(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int = MAX_SHARD_BYTES
) -> dict[str, str]:
    """Write tensors as model-0000i-of-0000n.safetensors with an index, or as one model.safetensors if they fit.

    Args:
        folder: an existing folder.
        tensors: (name, tensor), consumed one by one; no more than one shard is held.
        max_shard_bytes: largest size of a shard in bytes; only a single larger tensor exceeds it.

    Returns:
        Tensor name -> name of its file.
    """
    parts: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    size = total = parameters = 0

    def flush() -> None:
        save_file(shard, folder / f"part-{len(parts)}", metadata={"format": "pt"})
        parts.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_shard_bytes:
            flush()
            size = 0
        shard[name] = tensor.contiguous()
        size, total, parameters = size + tensor.nbytes, total + tensor.nbytes, parameters + tensor.numel()
    flush()
    weight_map = {}
    for index, names in enumerate(parts):
        file = "model.safetensors"
        if len(parts) > 1:
            file = f"model-{index + 1:05d}-of-{len(parts):05d}.safetensors"
        (folder / f"part-{index}").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    if len(parts) > 1:
        metadata = {"total_size": total, "total_parameters": parameters}
        write_json(folder / ("model.safetensors" + INDEX_SUFFIX), {"metadata": metadata, "weight_map": weight_map})
    return weight_map


def write_json(path: Path, content: Any) -> None:
    """Write JSON as transformers does: indented, sorted, with a newline at the end."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
