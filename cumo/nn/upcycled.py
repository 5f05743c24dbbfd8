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
        """The mixtures by their names in the model.

        Raises:
            ValueError: one of them has been replaced.
        """
        return {name: layer.moe for name, layer in self._layers().items()}

    def _layers(self) -> dict[str, UpcycledMLP]:
        layers = {}
        for name in self._dense:
            layer = self.model.get_submodule(name)
            if not isinstance(layer, UpcycledMLP):
                raise ValueError(f"{name}: expected an UpcycledMLP, got {type(layer).__name__}: it has been replaced")
            layers[name] = layer
        return layers

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
            routings: of `routings()`, all of equally many tokens.
            mode: see `cumo.nn.losses.routing_losses`.

        Raises:
            ValueError: none was called, or they were called within a reentrant checkpoint, where their routing has no
                gradient.
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
        called = list(routings.values())
        return routing_losses(called, [called[0].balance_S.shape[0]], mode)

    def undo(self) -> None:
        """Put the dense MLPs back, as they were; what the experts have learnt is given up.

        Raises:
            ValueError: a mixture has been replaced; nothing is changed then.
        """
        self._layers()
        for name, mlp in self._dense.items():
            _replace(self.model, name, mlp)
        self._dense = {}


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def upcycle(model: nn.Module, pattern: str, num_experts: int, top_k: int, **options: Any) -> Upcycled:
    """Replace every MLP of a model whose name matches by a mixture of copies of it (upcycling, arXiv 2212.05055).

    The model computes what it did, until it is trained. It keeps its class and its calls; its state dict has
    `NAME.moe.gate.weight`, `NAME.moe.up_proj` and so on in the place of the dense weights, and is loaded into a model
    that was upcycled alike.

    Args:
        model: changed in place.
        pattern: a regular expression for the whole name of an MLP in the model, such as
            `r"vision_model\\.encoder\\.layers\\.\\d+\\.mlp"`.
        num_experts: E of each mixture.
        top_k: K, experts per token.
        options: of `upcycle_mlp`: `noise`, `generator`, `activation`, `recompute`, ...

    Raises:
        ValueError: no name matches, a matching module is no MLP that `upcycle_mlp` knows, or an argument does not fit.
            The model is not changed then.

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
    matching = {name: module for name, module in model.named_modules() if name and re.fullmatch(pattern, name)}
    if not matching:
        raise ValueError(f"pattern: expected to match the name of a module, got {pattern!r}, which matches none")
    layers = {}
    for name, mlp in matching.items():
        try:
            layers[name] = UpcycledMLP(upcycle_mlp(mlp, num_experts, top_k, **options), name)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    for name, layer in layers.items():
        _replace(model, name, layer.train(matching[name].training))
    return Upcycled(model, matching)
