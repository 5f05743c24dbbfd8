# SPDX-License-Identifier: Apache-2.0
"""Upcycle a checkpoint to one with experts (arXiv 2212.05055): each expert is a copy of the dense MLP.

Vision encoder, connector and language model (Mistral -> Mixtral) each get any number of experts, or none. Tensors are
processed as a stream; gates and noise depend only on the seed and the tensor's name. `cumo upcycle` on the command
line; `cumo.nn.upcycle_mlp` does the same to a module in memory.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import MixtralConfig

from cumo.checkpoints.convert import checked, copy_companions, open_checkpoint, write_native
from cumo.checkpoints.files import written_aside
from cumo.config import CuMoConfig
from cumo_kernels.checks import check_top_k

# Language models whose layers equal Mixtral's except for the MLP
TEXT_TYPES = ("mistral", "llama")


class _Part(NamedTuple):
    """How the dense MLPs of a part of the model become experts."""

    prefix: re.Pattern[str]
    """Prefix of the tensors of one MLP."""
    sources: dict[str, tuple[str, ...]]
    """Stacked parameter -> dense tensors, whose rows are concatenated."""
    experts: str
    """Prefix of the stacked parameters' names; the gate's name does not have it."""


_PARTS = {
    "vision": _Part(
        re.compile(r"vision_tower\.layers\.\d+\.mlp\."),
        {
            "up_proj": ("fc1.weight",),
            "up_proj_bias": ("fc1.bias",),
            "down_proj": ("fc2.weight",),
            "down_proj_bias": ("fc2.bias",),
        },
        "",
    ),
    "connector": _Part(
        re.compile(r"connector\.projection\."),
        {
            "up_proj": ("0.weight",),
            "up_proj_bias": ("0.bias",),
            "down_proj": ("2.weight",),
            "down_proj_bias": ("2.bias",),
        },
        "",
    ),
    "text": _Part(
        re.compile(r"language_model\.model\.layers\.\d+\.mlp\."),
        {"gate_up_proj": ("gate_proj.weight", "up_proj.weight"), "down_proj": ("down_proj.weight",)},
        "experts.",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Upcycling:
    """Which parts to upcycle, and how.

    Raises:
        ValueError: a number is out of range, or no part is to be upcycled.

    Examples:
        >>> Upcycling(vision=4, connector=4).experts
        {'vision': 4, 'connector': 4}
    """

    vision: int | None = None
    """Experts of each block of the vision encoder; None leaves the part dense."""
    connector: int | None = None
    text: int | None = None
    top_k: int = 2
    """Experts per token, in all parts."""
    seed: int = 0
    noise: float = 0.0
    """Standard deviation of the Gaussian noise added to each expert, relative to that of its tensor."""

    def __post_init__(self) -> None:
        """Validate."""
        if not self.experts:
            raise ValueError("experts: expected a number for vision, connector or text, got none")
        for part, num_experts in self.experts.items():
            if num_experts < 2:
                raise ValueError(f"{part}: expected two experts or more, got {num_experts}")
            check_top_k(self.top_k, num_experts)
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise ValueError(f"noise: expected a finite number >= 0, got {self.noise!r}")

    @property
    def experts(self) -> dict[str, int]:
        """Number of experts of each part that is to be upcycled."""
        return {part: getattr(self, part) for part in _PARTS if getattr(self, part) is not None}


def upcycle_config(config: CuMoConfig, upcycling: Upcycling) -> CuMoConfig:
    """Return the configuration of the upcycled model.

    Raises:
        ValueError: a part has experts already, or cannot have any.

    Examples:
        >>> from cumo import CuMoConfig
        >>> dense = CuMoConfig.from_preset("tiny", connector_num_experts=1, connector_num_experts_per_tok=1)
        >>> upcycle_config(dense, Upcycling(connector=4)).connector_num_experts
        4
    """
    config = copy.deepcopy(config)
    if upcycling.vision is not None:
        _check_dense("vision", config.vision_config.num_experts)
        config.vision_config.num_experts = upcycling.vision
        config.vision_config.num_experts_per_tok = upcycling.top_k
    if upcycling.connector is not None:
        _check_dense("connector", config.connector_num_experts)
        if config.connector_type != "mlp2x_gelu":
            raise ValueError(f"connector: expected connector_type mlp2x_gelu, got {config.connector_type!r}")
        config.connector_num_experts = upcycling.connector
        config.connector_num_experts_per_tok = upcycling.top_k
    if upcycling.text is not None:
        config.text_config = _mixtral(config.text_config, upcycling.text, upcycling.top_k)
    return config


def _check_dense(part: str, num_experts: int) -> None:
    if num_experts > 1:
        raise ValueError(
            f"{part}: expected a dense one, got {num_experts} experts; to continue from them, train without upcycling"
        )


def _mixtral(text: Any, num_experts: int, top_k: int) -> MixtralConfig:
    """Return the Mixtral configuration whose layers equal those of `text` except for the MLP."""
    _check_dense("text", getattr(text, "num_local_experts", 1))
    biased = getattr(text, "attention_bias", False) or getattr(text, "mlp_bias", False)
    if text.model_type not in TEXT_TYPES or biased:
        raise ValueError(f"text: expected one of {TEXT_TYPES} without biases, got {text.model_type!r}, biases {biased}")
    fields = {key: value for key, value in text.to_dict().items() if key not in ("model_type", "architectures")}
    return MixtralConfig(**fields, num_local_experts=num_experts, num_experts_per_tok=top_k)


def generator_for(seed: int, name: str) -> torch.Generator:
    """Return a tensor's random generator. It depends on seed and name only, not on the order of tensors."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def upcycle_tensors(tensors: Iterable[tuple[str, Tensor]], upcycling: Upcycling) -> Iterator[tuple[str, Tensor]]:
    """Yield the upcycled model's tensors, given a stream of the dense model's tensors under our names.

    Other tensors are passed on unchanged. Each gate is drawn as `nn.Linear` draws its weight, in float32.

    Raises:
        ValueError: tensors of an MLP are missing or unknown.
    """
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        found = next((part for part in upcycling.experts if _PARTS[part].prefix.match(name)), None)
        if found is None:
            yield name, tensor
            continue
        match = _PARTS[found].prefix.match(name)
        assert match is not None
        prefix = match[0]
        group = waiting.setdefault(prefix, {})
        group[name.removeprefix(prefix)] = tensor
        wanted = {source for sources in _PARTS[found].sources.values() for source in sources}
        if not group.keys() <= wanted:
            raise ValueError(f"{name}: expected one of {sorted(wanted)} behind {prefix}, the tensors of a dense MLP")
        if group.keys() == wanted:
            yield from _experts_of(waiting.pop(prefix), prefix, _PARTS[found], upcycling.experts[found], upcycling)
    if waiting:
        got = {prefix: sorted(group) for prefix, group in waiting.items()}
        raise ValueError(f"tensors: expected all of each dense MLP, got only {got}")


def _experts_of(
    dense: Mapping[str, Tensor], prefix: str, part: _Part, num_experts: int, upcycling: Upcycling
) -> Iterator[tuple[str, Tensor]]:
    """Yield the gate and the stacked experts of one MLP."""
    first = next(iter(dense.values()))
    gate = torch.empty(num_experts, dense[next(iter(part.sources.values()))[0]].shape[1])
    name = prefix + "gate.weight"
    nn.init.kaiming_uniform_(gate, a=math.sqrt(5), generator=generator_for(upcycling.seed, name))
    yield name, gate.to(first.dtype)
    for parameter, sources in part.sources.items():
        name = prefix + part.experts + parameter
        expert = torch.cat([dense[source] for source in sources])
        stacked = expert.expand(num_experts, *expert.shape).clone(memory_format=torch.contiguous_format)
        if upcycling.noise:
            generator, scale = generator_for(upcycling.seed, name), upcycling.noise * expert.float().std(correction=0)
            for row in stacked:
                row.add_((scale * torch.randn(row.shape, generator=generator)).to(row.dtype))
        yield name, stacked


def upcycle_checkpoint(source: Path, target: Path, upcycling: Upcycling, base: Path | None = None) -> None:
    """Upcycle a checkpoint of either layout into one of ours.

    Args:
        source: folder of a dense checkpoint, in our layout or the published one.
        target: a folder that does not exist yet.
        upcycling: which parts to upcycle, and how.
        base: see `cumo.checkpoints.published_folder.open_published`.

    Raises:
        ValueError: a part has experts already, or the checkpoint is incomplete or damaged. `target` is not left behind.
    """
    dense, tensors = open_checkpoint(source, base)
    config = upcycle_config(dense, upcycling)
    with written_aside(target) as folder:
        write_native(folder, config, checked(upcycle_tensors(tensors, upcycling), config, source))
        copy_companions(source, folder)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `cumo upcycle`."""
    parser.add_argument("source", type=Path, help="folder of a dense checkpoint, of either layout")
    parser.add_argument("target", type=Path, help="folder to write, which must not exist yet")
    for part in _PARTS:
        parser.add_argument(
            f"--{part}", type=int, metavar="EXPERTS", help=f"experts of the {part}; left dense if absent"
        )
    parser.add_argument("--top-k", type=int, default=2, help="experts per token")
    parser.add_argument("--seed", type=int, default=0, help="of gates and noise")
    parser.add_argument("--noise", type=float, default=0.0, help="standard deviation relative to the weights'")
    parser.add_argument("--base", type=Path, help="model that a first stage builds on")


def run(arguments: argparse.Namespace) -> None:
    """Run `cumo upcycle`."""
    names = ("vision", "connector", "text", "top_k", "seed", "noise")
    upcycling = Upcycling(**{name: getattr(arguments, name) for name in names})
    upcycle_checkpoint(arguments.source, arguments.target, upcycling, arguments.base)
    print(f"{arguments.target}: written with experts {upcycling.experts}")
