# SPDX-License-Identifier: Apache-2.0
"""Losses, expert loads and tokens since the last line of the log: sums on the device, read once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from cumo.config import CuMoConfig
from cumo.train.losses import PARTS, PICTURED, Counts, weighted
from cumo_kernels import Routing

SUMS = ("steps", "image_steps", "images", "tokens")


def _log_or_one(number: int) -> float:
    return math.log(number) if number > 1 else 1.0


class Meter:
    """Sums over the passes since the last `report`.

    Args:
        config: of the model: which experts there are.
        device: where the sums live.
    """

    def __init__(self, config: CuMoConfig, device: torch.device) -> None:
        self.config = config
        self.scales = list(config.vision_config.scales)
        self.sums: dict[str, Tensor] = {
            name: torch.zeros((), dtype=torch.float64, device=device) for name in (*PARTS, *SUMS)
        }
        vision, text = config.vision_config, config.text_config
        layers = vision.encoder_config.num_hidden_layers if vision.keep_unused_layers else vision.num_used_layers
        sizes = {
            "vision": (layers, len(self.scales), vision.num_experts),
            "connector": (1, 1, config.connector_num_experts),
            "text": (text.num_hidden_layers, 1, config.text_num_experts if config.has_text_router_losses else 1),
        }
        self.top_k = {
            "vision": vision.num_experts_per_tok,
            "connector": config.connector_num_experts_per_tok,
            "text": getattr(text, "num_experts_per_tok", None) or 1,
        }
        self.sizes = {module: size for module, size in sizes.items() if size[2] > 1}
        for module, (layers, groups, experts) in self.sizes.items():
            for name, shape in (("load", (layers, groups, experts)), ("probs", (layers, groups, experts)),
                                ("choice", (layers, groups))):  # fmt: skip
                self.sums[f"{module}/{name}"] = torch.zeros(shape, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, parts: Mapping[str, Tensor], output: Any, of_pass: Counts) -> None:
        """One pass: its contributions to the losses, what its routers did, and its counts."""
        for name, part in parts.items():
            self.sums[name] += part
        self.sums["images"] += of_pass.images
        self.sums["tokens"] += of_pass.tokens
        connector = output.get("connector_routing")
        routings: dict[str, tuple[Sequence[Routing], Sequence[int]]] = {
            "vision": (output.get("vision_routings") or (), output.get("tiles_per_scale") or ()),
            "connector": (() if connector is None else (connector,), (int(of_pass.images),) if connector else ()),
            "text": (output.get("text_routings") or (), (1,)),
        }
        for module in self.sizes:
            layers, groups = routings[module]
            if layers:
                self._add_routings(module, layers, groups)

    def add_step(self, of_step: Counts) -> None:
        """A step of the optimizer, in each process."""
        self.sums["steps"] += 1
        self.sums["image_steps"] += of_step.images > 0

    def _add_routings(self, module: str, layers: Sequence[Routing], groups: Sequence[int]) -> None:
        """Choices, probabilities and decidedness of L layers, by group of segments."""
        experts = self.sizes[module][2]
        expert_LTK = torch.stack([layer.expert_TK for layer in layers]).long()
        weight_LTK = torch.stack([layer.weight_TK for layer in layers]).float()
        probs_LSE = torch.stack([layer.mean_probs_SE for layer in layers])
        per_segment = expert_LTK.shape[1] // probs_LSE.shape[1]
        entropy_LT = torch.special.entr(weight_LTK).sum(dim=-1)
        begin = 0
        for group, segments in enumerate(groups):
            rows = slice(begin * per_segment, (begin + segments) * per_segment)
            chosen = expert_LTK[:, rows].flatten(1)
            counts = torch.zeros(len(layers), experts, device=chosen.device)
            counts.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=counts.dtype))
            self.sums[f"{module}/load"][: len(layers), group] += counts
            self.sums[f"{module}/probs"][: len(layers), group] += (
                probs_LSE[:, begin : begin + segments].sum(dim=1) * per_segment
            )
            self.sums[f"{module}/choice"][: len(layers), group] += entropy_LT[:, rows].sum(dim=1)
            begin += segments

    def gather(self) -> None:
        """Move the sums of all processes into the first; each process has to call it."""
        if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
            return
        flat = torch.cat([value.flatten() for value in self.sums.values()])
        distributed.all_reduce(flat)
        if distributed.get_rank() > 0:
            flat.zero_()
        pieces = flat.split([value.numel() for value in self.sums.values()])
        for (name, value), piece in zip(list(self.sums.items()), pieces, strict=True):
            self.sums[name] = piece.view(value.shape).clone()

    def report(self, processes: int) -> dict[str, Any]:
        """What the log says, by the first process after `gather`; and begin anew.

        Args:
            processes: how many `add_step` counted each step.

        Returns:
            `images` and `tokens`; `loss`, its mean over the steps; the mean of each part of it, those of encoder and
            connector over the steps that had pictures, absent without such; `expert_load`, `router_entropy` and
            `choice_entropy`, each by module, layer and, for the encoder, scale.
        """
        sums = {name: value.to("cpu", copy=True) for name, value in self.sums.items()}
        for value in self.sums.values():
            value.zero_()
        steps, image_steps = (round(float(sums[name]) / processes) for name in ("steps", "image_steps"))
        parts = {name: float(sums[name]) for name in PARTS if name == "lm_loss" or name.split("_")[0] in self.sizes}
        record: dict[str, Any] = {"loss": weighted(parts, self.config) / max(steps, 1)}
        for name, part in parts.items():
            over = image_steps if name.startswith(PICTURED) else steps
            if over:
                record[name] = part / over
        record |= {"images": int(sums["images"]), "tokens": int(sums["tokens"])}
        for key in ("expert_load", "router_entropy", "choice_entropy"):
            record[key] = {}
        for module, (_, _, experts) in self.sizes.items():
            load, probs, choice = (sums[f"{module}/{name}"] for name in ("load", "probs", "choice"))
            if not load.sum():
                continue  # no pictures since the last line
            layers = int(load.flatten(1).sum(dim=1).count_nonzero())  # of a decoder, some layers may be dense
            load, probs, choice = load[:layers], probs[:layers], choice[:layers]
            total = load.sum(dim=-1, keepdim=True).clamp(min=1)
            mean = probs / probs.sum(dim=-1, keepdim=True).clamp(min=1e-30)
            entropy = torch.special.entr(mean).sum(dim=-1) / _log_or_one(experts)
            tokens = total.squeeze(-1) / self.top_k[module]
            decided = choice / tokens.clamp(min=1) / _log_or_one(self.top_k[module])
            for key, values in (
                ("expert_load", load / total), ("router_entropy", entropy), ("choice_entropy", decided)
            ):  # fmt: skip
                record[key][module] = self._by_layer(module, values)
        return record

    def _by_layer(self, module: str, values: Tensor) -> Any:
        """[layers, groups, ...] -> {layer: {scale: ...}} for the encoder, {layer: ...} for text, one for connector."""
        if module == "connector":
            return values[0, 0].tolist()
        if module == "text":
            return {str(layer): values[layer, 0].tolist() for layer in range(len(values))}
        return {
            str(layer): {str(scale): values[layer, group].tolist() for group, scale in enumerate(self.scales)}
            for layer in range(len(values))
        }

    def state_dict(self) -> dict[str, Tensor]:
        """The sums, in the first process those of all processes; each process has to call it."""
        self.gather()
        return {name: value.to("cpu", copy=True) for name, value in self.sums.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on with these sums, in the first process; the others begin with none."""
        for name, value in self.sums.items():
            value.copy_(state[name]) if name in state else value.zero_()


def flat(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record for tensorboard and the like; of loads, the least and the largest of each layer."""
    numbers: dict[str, float] = {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(f"{path}/{key}" if path else str(key), inner)
        elif isinstance(value, list):
            numbers[f"{path}/least"], numbers[f"{path}/most"] = min(value), max(value)
        elif isinstance(value, (int, float)):
            numbers[path] = float(value)

    walk("", record)
    return numbers
