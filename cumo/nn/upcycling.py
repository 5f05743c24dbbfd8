# SPDX-License-Identifier: Apache-2.0
"""Sparse upcycling (arXiv 2212.05055): from a trained dense MLP to a Mixture-of-Experts of copies of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cumo.nn.moe import MoEMLP
from cumo_kernels import ACTIVATIONS

# Names under which MLPs hold their up, down and, if any, gate projection.
PROJECTION_NAMES = (("up_proj", "down_proj", "gate_proj"), ("fc1", "fc2", None))
ACTIVATION_NAMES = ("activation_fn", "act_fn", "act", "activation")
# Names of transformers' configurations for what `ACTIVATIONS` calls otherwise; all of the former are one function.
ACTIVATION_ALIASES = {
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "swish": "silu",
}


class _DenseMLP(NamedTuple):
    """down(act(up(x))), or down(act(gate(x)) * up(x))."""

    up: nn.Linear
    down: nn.Linear
    gate: nn.Linear | None
    activation: Any
    """A function or module, a name, or None if the MLP does not say."""


def _does_nothing(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and module.p == 0)


def _read_sequential(mlp: nn.Sequential) -> _DenseMLP:
    layers = [layer for layer in mlp if not _does_nothing(layer)]
    match layers:
        case [nn.Linear() as up, activation, nn.Linear() as down] if not isinstance(activation, nn.Linear):
            return _DenseMLP(up, down, None, activation)
    raise ValueError(
        "mlp: expected a Sequential of Linear, activation, Linear (and any Identity or Dropout(p=0), as MoEMLP has no "
        f"dropout), got {[str(layer) for layer in mlp]}"
    )


def _read_named(mlp: nn.Module) -> _DenseMLP:
    """The parts of an MLP by the names of its attributes; whatever else it holds is an error."""
    children = {name: child for name, child in mlp.named_children() if not _does_nothing(child)}
    names = next((names for names in PROJECTION_NAMES if all(hasattr(mlp, name) for name in names[:2])), None)
    if names is None:
        pairs = " or ".join(f"{up} and {down}" for up, down, _ in PROJECTION_NAMES)
        raise ValueError(f"mlp: expected a Sequential, or a module with {pairs}, got {_describe(mlp)}")
    activation_name = next((name for name in ACTIVATION_NAMES if hasattr(mlp, name)), None)
    others = [name for name in children if name not in (*names, activation_name)]
    if activation_name is None and len(others) == 1:
        activation_name = others.pop()
    others += [name for name, _ in mlp.named_parameters(recurse=False)]
    if others:
        raise ValueError(
            f"mlp: expected {', '.join(name for name in names if name)} and an activation (and any Identity or "
            f"Dropout(p=0), as MoEMLP has no dropout), got {', '.join(others)} too in {_describe(mlp)}"
        )
    up_name, down_name, gate_name = names
    return _DenseMLP(
        getattr(mlp, up_name),
        getattr(mlp, down_name),
        None if gate_name is None else getattr(mlp, gate_name, None),
        getattr(getattr(mlp, "config", None), "hidden_act", None)
        if activation_name is None
        else getattr(mlp, activation_name),
    )


def _describe(mlp: nn.Module) -> str:
    children = ", ".join(f"{name}={type(child).__name__}" for name, child in mlp.named_children())
    return f"{type(mlp).__name__}({children})"


def _check_layers(dense: _DenseMLP) -> None:
    """The layers are plain linear ones, and those that are stacked with one another are alike."""
    layers = {name: layer for name, layer in dense._asdict().items() if name != "activation" and layer is not None}
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"mlp: expected its {name} projection to be an nn.Linear, got {layer}")
        weight = layer.weight
        if not weight.is_floating_point() or weight.shape != (layer.out_features, layer.in_features):
            raise ValueError(
                f"mlp: expected a floating-point weight of shape {[layer.out_features, layer.in_features]} in its "
                f"{name} projection, got {weight.dtype} {list(weight.shape)}; quantised layers cannot be upcycled"
            )
        if (weight.dtype, weight.device) != (dense.up.weight.dtype, dense.up.weight.device):
            raise ValueError(
                f"mlp: expected its {name} projection in {dense.up.weight.dtype} on {dense.up.weight.device} as its up "
                f"projection, got {weight.dtype} on {weight.device}"
            )
    if dense.down.in_features != dense.up.out_features:
        raise ValueError(
            f"mlp: expected its down projection to take the {dense.up.out_features} features that its up projection "
            f"gives, got {dense.down}"
        )
    if dense.gate is not None:
        actual, expected = (
            {name: (list(parameter.shape), parameter.requires_grad) for name, parameter in layer.named_parameters()}
            for layer in (dense.gate, dense.up)
        )
        if actual != expected:
            raise ValueError(
                "mlp: expected its gate projection to have the (shape, requires_grad) of its up projection, "
                f"{expected}, got {actual}"
            )


def _sample(function: Callable[[Tensor], Tensor]) -> Tensor:
    """Values of an elementwise function where those of `ACTIVATIONS` differ, and far out, where others are clipped."""
    near = torch.linspace(-8, 8, 257, dtype=torch.float64, device="cpu")
    far = 10.0 ** torch.arange(1, 6, dtype=torch.float64, device="cpu")
    return function(torch.cat([near, far]))


def _recognise(activation: Any) -> str:
    """Name in `ACTIVATIONS` of a name, or of whatever computes the same values: class names differ by library."""
    if isinstance(activation, str):
        name: str | None = ACTIVATION_ALIASES.get(activation, activation)
    else:
        name = _name_by_values(activation)
    if name is None or name not in ACTIVATIONS:
        raise ValueError(
            f"mlp: expected an activation out of {list(ACTIVATIONS)}, got {activation!r}; activation= overrides it"
        )
    return name


@torch.no_grad()
def _name_by_values(activation: Any) -> str | None:
    if not callable(activation) or (isinstance(activation, nn.Module) and list(activation.parameters())):
        return None  # with parameters it may be one of `ACTIVATIONS` today, and another after a step of training
    try:
        values = _sample(activation)
    except Exception:  # whatever it takes or does, it is no function of one tensor
        return None
    for name, function in ACTIVATIONS.items():
        expected = _sample(function)
        # GELU and its tanh approximation, the two nearest, are 5e-4 apart
        if (
            isinstance(values, Tensor)
            and values.shape == expected.shape
            and torch.allclose(values, expected, rtol=1e-6, atol=1e-6)
        ):
            return name
    return None


def _sources(dense: _DenseMLP) -> dict[str, list[Tensor]]:
    """Parameter of `MoEMLP` -> the tensors whose rows, one below the other, make each expert of it."""
    first = [dense.up] if dense.gate is None else [dense.gate, dense.up]
    return {
        "up_proj": [layer.weight for layer in first],
        "up_proj_bias": [layer.bias for layer in first if layer.bias is not None],
        "down_proj": [dense.down.weight],
        "down_proj_bias": [] if dense.down.bias is None else [dense.down.bias],
    }


def _draw(parameter: Tensor, generator: torch.Generator | None) -> Tensor:
    """A float32 tensor of that shape, to be drawn where `generator` lives, so that a seed means the same everywhere."""
    device = parameter.device if generator is None else generator.device
    return torch.empty(parameter.shape, device=device, dtype=torch.float32)


@torch.no_grad()
def _fill(moe: MoEMLP, dense: _DenseMLP, noise: float, generator: torch.Generator | None) -> None:
    """Gate as a new nn.Linear, experts as copies of `dense` with noise; the gate is drawn first, whatever the noise."""
    gate = moe.gate.weight
    gate.copy_(nn.init.kaiming_uniform_(_draw(gate, generator), a=math.sqrt(5), generator=generator))
    for name, sources in _sources(dense).items():
        if not sources:
            moe.register_parameter(name, None)
            continue
        parameter, expert = getattr(moe, name), torch.cat(sources)
        parameter.copy_(expert.expand_as(parameter))
        parameter.requires_grad_(sources[0].requires_grad)
        if noise:
            scale = noise * expert.float().std(correction=0)
            for slice in parameter:
                slice.add_(scale * _draw(slice, generator).normal_(generator=generator).to(slice.device))


def upcycle_mlp(
    mlp: nn.Module,
    num_experts: int,
    top_k: int,
    *,
    activation: str | None = None,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
    normalize: bool = True,
    router_dtype: torch.dtype | None = torch.float32,
    probs_dtype: torch.dtype = torch.float32,
    recompute: bool = False,
) -> MoEMLP:
    """A Mixture-of-Experts whose every expert is a copy of a dense MLP (sparse upcycling, arXiv 2212.05055).

    Without noise it computes what the MLP does, whatever the gate: experts that agree, with weights that sum to one.
    Training then tells the experts apart, since each sees other tokens.

    Args:
        mlp: down(act(up(x))), as an `nn.Sequential` of Linear, activation, Linear; or by the names of its layers, `fc1`
            and `fc2`, or `up_proj` and `down_proj`; with `gate_proj` too, down(act(gate(x)) * up(x)). Its activation
            is the module or function `activation_fn`, `act_fn`, `act` or `activation`, or `config.hidden_act`. CLIP,
            Llama and Mistral of transformers and timm's Mlp are such. It is not changed, nor shares memory with the
            result, which takes over dtype, device, requires_grad, training mode and missing biases.
        num_experts: E.
        top_k: K, experts per token.
        activation: a name in `cumo_kernels.ACTIVATIONS`, where that of `mlp` is to be overridden. By default it is
            recognised by the values that it computes.
        noise: standard deviation of the Gaussian noise added to each expert, relative to that of the tensor it is
            added to. With noise the output is no longer that of `mlp`.
        generator: draws the gate (as a new `nn.Linear`, in float32), then the noise; the same on every device.
        normalize: must be True. Otherwise the weights of a token would sum to less than one, and scale its output.
        router_dtype: see `MoEMLP`.
        probs_dtype: see `MoEMLP`; bfloat16 weights sum to one but for their rounding.
        recompute: see `MoEMLP`.

    Raises:
        ValueError: `mlp` holds something else, or an argument does not fit.

    Examples:
        >>> import torch
        >>> from cumo.nn import upcycle_mlp
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8))
        >>> moe = upcycle_mlp(mlp, num_experts=4, top_k=2)
        >>> moe.activation, moe.up_proj.shape  # the activation is recognised by its values
        ('gelu', torch.Size([4, 16, 8]))
        >>> x = torch.randn(5, 8)
        >>> torch.allclose(moe(x)[0], mlp(x), atol=1e-5)
        True
    """
    if not normalize:
        raise ValueError(
            "normalize: expected True, got False: experts that agree give the output of the dense MLP only if the "
            "weights of the selected experts sum to one"
        )
    if not (math.isfinite(noise) and noise >= 0):
        raise ValueError(f"noise: expected a finite number >= 0, got {noise!r}")
    dense = _read_sequential(mlp) if isinstance(mlp, nn.Sequential) else _read_named(mlp)
    _check_layers(dense)
    moe = MoEMLP(
        dense.up.in_features,
        dense.up.out_features,
        dense.down.out_features,
        num_experts=num_experts,
        top_k=top_k,
        activation=_recognise(dense.activation) if activation is None else activation,
        gated=dense.gate is not None,
        router_dtype=router_dtype,
        probs_dtype=probs_dtype,
        recompute=recompute,
        device="meta",  # nothing is drawn in vain, nor from the global generator
        dtype=dense.up.weight.dtype,
    )
    moe.to_empty(device=dense.up.weight.device)
    _fill(moe, dense, noise, generator)
    return moe.train(mlp.training)
