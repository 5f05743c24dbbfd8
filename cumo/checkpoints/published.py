# SPDX-License-Identifier: Apache-2.0
"""Translate the tensor names of the published checkpoints (`llava_mistral`, `llava_mixtral`) to ours and back.

`cumo.checkpoints.layout` stacks the experts; here prefixes are exchanged, and the language model's experts get the
names that transformers has for them. All functions are pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

from cumo.checkpoints.layout import stacked_tensors, unstacked_tensors

# (published pattern, published form, our pattern, our form), tried in order; {0} is what the group matched
_TABLE = (
    (r"model\.vision_tower\.vision_model\.encoder\.layers\.(\d+\.(?:self_attn|layer_norm\d|mlp)\..+)",
     "model.vision_tower.vision_model.encoder.layers.{0}",
     r"vision_tower\.layers\.(\d+\.(?:self_attn|layer_norm\d|mlp\.fc\d)\b.*)", "vision_tower.layers.{0}"),
    (r"model\.vision_tower\.vision_model\.encoder\.layers\.(\d+)\.(.+)",
     "model.vision_tower.vision_model.encoder.layers.{0}.{1}",
     r"vision_tower\.layers\.(\d+)\.mlp\.(.+)", "vision_tower.layers.{0}.mlp.{1}"),
    (r"model\.vision_tower\.vision_model\.(.+)", "model.vision_tower.vision_model.{0}",
     r"vision_tower\.(.+)", "vision_tower.{0}"),
    (r"model\.mm_projector\.(.+)", "model.mm_projector.{0}",
     r"connector\.projection\.(.+)", "connector.projection.{0}"),
    (r"model\.layers\.(\d+)\.block_sparse_moe\.gate\.weight", "model.layers.{0}.block_sparse_moe.gate.weight",
     r"language_model\.model\.layers\.(\d+)\.mlp\.gate\.weight", "language_model.model.layers.{0}.mlp.gate.weight"),
    (r"model\.layers\.(\d+)\.block_sparse_moe\.up_proj", "model.layers.{0}.block_sparse_moe.up_proj",
     r"language_model\.model\.layers\.(\d+)\.mlp\.experts\.gate_up_proj",
     "language_model.model.layers.{0}.mlp.experts.gate_up_proj"),
    (r"model\.layers\.(\d+)\.block_sparse_moe\.down_proj", "model.layers.{0}.block_sparse_moe.down_proj",
     r"language_model\.model\.layers\.(\d+)\.mlp\.experts\.down_proj",
     "language_model.model.layers.{0}.mlp.experts.down_proj"),
    (r"(.+)", "{0}", r"language_model\.(.+)", "language_model.{0}"),
)  # fmt: skip


def _rename(name: str, source: int, target: int) -> str:
    for row in _TABLE:
        match = re.fullmatch(row[source], name)
        if match:
            return row[target].format(*match.groups())
    raise ValueError(f"{name}: expected a name of a CuMo checkpoint")


def native_name(name: str) -> str:
    """Return our name of a published tensor whose experts are stacked already.

    Raises:
        ValueError: `name` is not a name of a CuMo checkpoint.

    Examples:
        >>> native_name("model.mm_projector.up_proj")
        'connector.projection.up_proj'
    """
    return _rename(name, 0, 3)


def published_name(name: str) -> str:
    """Return the published name of one of our tensors: the inverse of `native_name`.

    Raises:
        ValueError: `name` is not one of our names.
    """
    return _rename(name, 2, 1)


def native_tensors(state_dict: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield a published checkpoint's tensors under our names, experts stacked; see `layout.stacked_tensors`.

    Raises:
        ValueError: experts are missing, left over or of different shapes.
    """
    return ((native_name(name), tensor) for name, tensor in stacked_tensors(state_dict))


def to_native(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `native_tensors` as a dictionary."""
    return dict(native_tensors(state_dict))


class _Renamed(Mapping[str, Tensor]):
    """A mapping whose keys are renamed."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def published_tensors(state_dict: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield our tensors under their published names: the inverse of `native_tensors`, bit for bit.

    Raises:
        ValueError: a name is not one of our names.
    """
    return unstacked_tensors(_Renamed(state_dict, {published_name(name): name for name in state_dict}))


def to_published(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `published_tensors` as a dictionary."""
    return dict(published_tensors(state_dict))
