# SPDX-License-Identifier: Apache-2.0
"""Sparse upcycling of whole models: every MLP whose name matches becomes a mixture of experts, in place."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cumo.nn.losses import AuxLosses, routing_losses
from cumo.nn.moe import MoEMLP
from cumo.nn.upcycling import upcycle_mlp
from cumo_kernels import Routing


class UpcycledMLP(nn.Module):
    """A `MoEMLP` in the place of an MLP: it returns the output alone, and its routing to whoever collects.

    Args:
        moe: the mixture.
        name: under which its routing is collected.
    """

    def __init__(self, moe: MoEMLP, name: str) -> None:
        super().__init__()
        self.moe = moe
        self.name = name
        self.collector: dict[str, Routing] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., O]."""
        y, routing = self.moe(x)
        if self.collector is not None:
            self.collector[self.name] = routing
        return y


class Upcycled:
    """The mixtures that `upcycle` has put into a model.

    Args:
        model: with the mixtures in it.
        dense: the MLPs that they have replaced, by their names.

    Examples:
        >>> import torch
        >>> from cumo.nn import upcycle
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8))
        >>> model = torch.nn.ModuleDict({"mlp": mlp})
        >>> upcycled = upcycle(model, "mlp", num_experts=4, top_k=2)
        >>> upcycled.modules["mlp"].up_proj.shape
        torch.Size([4, 16, 8])
        >>> upcycled.undo()
        >>> model["mlp"] is mlp
        True
    """

    def __init__(self, model: nn.Module, dense: Mapping[str, nn.Module]) -> None:
        self.model = model
        self._dense = dict(dense)

    @property
    def modules(self) -> dict[str, MoEMLP]:
        """The mixtures by their names in the model; one that several modules share has the first of its names.

        Raises:
            ValueError: one of them has been replaced.
        """
        return {name: layer.moe for name, layer in self._layers().items()}

    def _layers(self) -> dict[str, UpcycledMLP]:
        """The layers, each by the first of its names."""
        layers: dict[int, tuple[str, UpcycledMLP]] = {}
        for name in self._dense:
            layer = self.model.get_submodule(name)
            if not isinstance(layer, UpcycledMLP):
                raise ValueError(f"{name}: expected an UpcycledMLP, got {type(layer).__name__}: it has been replaced")
            layers.setdefault(id(layer), (name, layer))
        return dict(layers.values())

    @contextmanager
    def routings(self) -> Iterator[dict[str, Routing]]:
        """Collect what the routers do within the block: the `Routing` of each mixture's last call, by name.

        Nothing is kept by the model outside of it.

        Raises:
            ValueError: a block within a block.
        """
        layers = self._layers()
        if any(layer.collector is not None for layer in layers.values()):
            raise ValueError("routings: expected no block within another of the same model")
        collected: dict[str, Routing] = {}
        for layer in layers.values():
            layer.collector = collected
        try:
            yield collected
        finally:
            for layer in layers.values():
                layer.collector = None

    def losses(self, routings: Mapping[str, Routing], mode: str = "switch") -> AuxLosses:
        """Balance loss and z-loss over all mixtures that were called.

        Args:
            routings: of `routings()`, all of equally many segments: images, or sequences of a batch.
            mode: see `cumo.nn.losses.routing_losses`.

        Raises:
            ValueError: `routings` is empty, has different numbers of segments, or comes from within a reentrant
                checkpoint, where it has no gradient.
        """
        if not routings:
            raise ValueError("routings: expected those of a forward pass, got none")
        modules = self.modules
        for name, routing in routings.items():
            if torch.is_grad_enabled() and modules[name].gate.weight.requires_grad and not routing.z_S.requires_grad:
                raise ValueError(
                    f"routings: {name}: expected one with a gradient, got none: it comes from torch.no_grad() or a "
                    "reentrant checkpoint; use_reentrant=False keeps it"
                )
        segments = {name: routing.balance_S.shape[0] for name, routing in routings.items()}
        if len(set(segments.values())) > 1:
            raise ValueError(
                f"routings: expected equally many segments in all mixtures, got {segments}: the leading dimensions of "
                "their inputs differ; call `losses` with those of one kind at a time"
            )
        return routing_losses(list(routings.values()), [next(iter(segments.values()))], mode)

    def undo(self) -> None:
        """Put the dense MLPs back, as they were; what the experts have learnt is given up.

        Raises:
            ValueError: a mixture has been replaced; nothing is changed then.
        """
        self._layers()
        for name, mlp in self._dense.items():
            _replace(self.model, name, mlp)
        self._dense = {}


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _check_replaceable(model: nn.Module, mlp: nn.Module, names: list[str]) -> None:
    """Nothing that hangs on an MLP, and would be lost with it, is there."""
    for path, module in mlp.named_modules():
        where = f" in its {path}" if path else ""
        hooks = [name.strip("_").replace("_", " ") for name in _HOOKS if getattr(module, name)]
        if "forward" in vars(module):
            hooks.append("a replaced forward")
        if hooks:
            raise ValueError(f"expected an MLP without hooks, which would be lost, got {', '.join(hooks)}{where}")
    own = {id(parameter) for parameter in mlp.parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in own and not name.startswith(tuple(f"{mine}." for mine in names)):
            raise ValueError(f"expected an MLP with parameters of its own, got one that is {name} too: tied parameters")


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def upcycle(model: nn.Module, pattern: str, num_experts: int, top_k: int, **options: Any) -> Upcycled:
    """Replace every MLP of a model whose name matches by a mixture of copies of it (upcycling, arXiv 2212.05055).

    The model computes what it did, until it is trained. It keeps its class and its calls. An MLP that the model has
    under several names becomes one mixture under all of them, also where only one name matches.

    The state dict has `NAME.moe.gate.weight`, `NAME.moe.up_proj` and so on in the place of the dense weights. It is
    loaded into a model that was built from its configuration and upcycled alike: `load_state_dict`, or
    `safetensors.torch.load_model` for the file that `save_pretrained` of transformers writes. Its `from_pretrained`
    knows dense MLPs only, and would draw new ones.

    Args:
        model: changed in place.
        pattern: a regular expression for the whole name of an MLP in the model, such as
            `r"vision_model\\.encoder\\.layers\\.\\d+\\.mlp"`.
        num_experts: E of each mixture.
        top_k: K, experts per token.
        options: of `upcycle_mlp`: `noise`, `generator`, `activation`, `recompute`, ...

    Raises:
        ValueError: `pattern` matches no name, or a module that `upcycle_mlp` does not know; a matching MLP has hooks, a
            replaced forward or parameters that are another module's too, which would be lost; or an argument does not
            fit. The model is not changed then.

    Examples:
        >>> import torch
        >>> from cumo.nn import upcycle
        >>> def mlp(): return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8))
        >>> model, x = torch.nn.Sequential(mlp(), torch.nn.LayerNorm(8), mlp()), torch.randn(3, 5, 8)
        >>> before = model(x)
        >>> upcycled = upcycle(model, "0|2", num_experts=4, top_k=2)
        >>> with upcycled.routings() as routings:
        ...     after = model(x)
        >>> list(routings), torch.allclose(after, before, atol=1e-5)
        (['0', '2'], True)
        >>> losses = upcycled.losses(routings)
        >>> (after.square().mean() + 0.01 * losses.balance + 0.001 * losses.z).backward()
    """
    names_of: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names_of.setdefault(module, []).append(name)
    matching = {
        module: [name for name in names if name]
        for module, names in names_of.items()
        if any(name and re.fullmatch(pattern, name) for name in names)
    }
    if not matching:
        raise ValueError(f"pattern: expected to match the name of a module, got {pattern!r}, which matches none")
    layers = {}
    for mlp, names in matching.items():
        try:
            layers[mlp] = UpcycledMLP(upcycle_mlp(mlp, num_experts, top_k, **options), names[0])
            _check_replaceable(model, mlp, names)
        except ValueError as error:
            raise ValueError(f"{names[0]}: {error}") from error
    for mlp, names in matching.items():
        for name in names:
            _replace(model, name, layers[mlp].train(mlp.training))
    return Upcycled(model, {name: mlp for mlp, names in matching.items() for name in names})
