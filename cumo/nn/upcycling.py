# SPDX-License-Identifier: Apache-2.0
"""Sparse upcycling (arXiv 2212.05055): from a trained dense MLP to a Mixture-of-Experts of copies of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cumo.nn.moe import MoEMLP
from cumo_kernels import ACTIVATIONS

# Names under which MLPs hold their projections. `gate_up` is one layer, whose first half of rows the activation is
# applied to.
PROJECTION_NAMES: tuple[dict[str, str], ...] = (
    {"gate_up": "gate_up_proj", "down": "down_proj"},  # Phi-3, GLM-4
    {"up": "up_proj", "down": "down_proj", "gate": "gate_proj"},  # Llama and most others; Nemotron without a gate
    {"up": "fc1", "down": "fc2"},  # CLIP, timm
    {"up": "c_fc", "down": "c_proj"},  # GPT-2, StarCoder2
    {"up": "dense_h_to_4h", "down": "dense_4h_to_h"},  # GPT-NeoX, Falcon
    {"gate_up": "Wi", "down": "Wo"},  # ModernBERT
)
_PARTS = ({"up", "down"}, {"up", "down", "gate"}, {"gate_up", "down"})
ACTIVATION_NAMES = ("activation_fn", "act_fn", "act", "activation")
# Names of transformers' configurations for what `ACTIVATIONS` calls otherwise; all of the former are one function.
ACTIVATION_ALIASES = {
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "swish": "silu",
}


class _Projection(NamedTuple):
    """A linear layer by its tensors, in the orientation of `nn.Linear`: weight [out, in], bias [out] or None."""

    weight: Tensor
    bias: Tensor | None


class _DenseMLP(NamedTuple):
    """down(act(up(x))), or down(act(gate(x)) * up(x)); gate and up are one layer where `is_fused`."""

    up: _Projection
    down: _Projection
    gate: _Projection | None
    activation: Any
    """A function or module, a name, or None if the MLP does not say."""
    is_fused: bool = False

    @property
    def d_hidden(self) -> int:
        """Features that the down projection takes."""
        return self.up.weight.shape[0] // (2 if self.is_fused else 1)


def _does_nothing(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and module.p == 0)


def _read_sequential(mlp: nn.Sequential) -> _DenseMLP:
    layers = [layer for layer in mlp if not _does_nothing(layer)]
    match layers:
        case [nn.Linear() as up, activation, nn.Linear() as down] if not isinstance(activation, nn.Linear):
            return _DenseMLP(_projection("up", up), _projection("down", down), None, activation)
    raise ValueError(
        "mlp: expected a Sequential of Linear, activation, Linear (and any Identity or Dropout(p=0), as MoEMLP has no "
        f"dropout), got {[str(layer) for layer in mlp]}"
    )


def _names_of(mlp: nn.Module, projections: Mapping[str, str] | None) -> dict[str, str]:
    """The MLP's own names of its projections, by role."""
    if projections is not None:
        if set(projections) not in _PARTS:
            raise ValueError(
                "projections: expected names of up and down, of up, down and gate, or of gate_up and down, got "
                f"{dict(projections)!r}"
            )
        missing = [name for name in projections.values() if not isinstance(getattr(mlp, name, None), nn.Module)]
        if missing:
            raise ValueError(f"projections: expected names of modules of the MLP, got {missing} for {_describe(mlp)}")
        return dict(projections)
    for names in PROJECTION_NAMES:
        found = {part: name for part, name in names.items() if getattr(mlp, name, None) is not None}
        if found.keys() >= names.keys() - {"gate"}:
            return found
    pairs = " or ".join(" and ".join(n for part, n in names.items() if part != "gate") for names in PROJECTION_NAMES)
    raise ValueError(
        f"mlp: expected a Sequential, or a module with {pairs} (projections= gives other names), got {_describe(mlp)}"
    )


def _read_named(mlp: nn.Module, projections: Mapping[str, str] | None) -> _DenseMLP:
    """The parts of an MLP by the names of its attributes; whatever else it holds is an error."""
    children = {name: child for name, child in mlp.named_children() if not _does_nothing(child)}
    names = _names_of(mlp, projections)
    activation_name = next((name for name in ACTIVATION_NAMES if hasattr(mlp, name)), None)
    others = [name for name in children if name not in (*names.values(), activation_name)]
    if activation_name is None and len(others) == 1:
        activation_name = others.pop()
    others += [name for name, _ in mlp.named_parameters(recurse=False)]
    # where dropout is a function rather than a module
    others += [f"{name}={value}" for name, value in vars(mlp).items() if "dropout" in name and _is_positive(value)]
    if others:
        raise ValueError(
            f"mlp: expected {', '.join(names.values())} and an activation (and any Identity or "
            f"Dropout(p=0), as MoEMLP has no dropout), got {', '.join(others)} too in {_describe(mlp)}"
        )
    layers = {part: _projection(part, getattr(mlp, name)) for part, name in names.items()}
    return _DenseMLP(
        layers["gate_up"] if "gate_up" in layers else layers["up"],
        layers["down"],
        layers.get("gate"),
        getattr(getattr(mlp, "config", None), "hidden_act", None)
        if activation_name is None
        else getattr(mlp, activation_name),
        "gate_up" in layers,
    )


def _is_positive(value: Any) -> bool:
    return isinstance(value, float) and value > 0


def _describe(mlp: nn.Module) -> str:
    children = ", ".join(f"{name}={type(child).__name__}" for name, child in mlp.named_children())
    return f"{type(mlp).__name__}({children})"


def _projection(part: str, layer: nn.Module) -> _Projection:
    """The tensors of a plain linear layer, or of the Conv1D of GPT-2, whose weight is that of one transposed."""
    weight: Any = getattr(layer, "weight", None)
    if isinstance(layer, nn.Linear):
        expected = [layer.out_features, layer.in_features]
    elif type(layer).__name__ == "Conv1D" and isinstance(weight, Tensor) and hasattr(layer, "nf"):
        expected = [*weight.shape]
    else:
        raise ValueError(f"mlp: expected its {part} projection to be an nn.Linear, got {layer}")
    if not weight.is_floating_point() or [*weight.shape] != expected:
        raise ValueError(
            f"mlp: expected a floating-point weight of shape {expected} in its {part} projection, got "
            f"{weight.dtype} {[*weight.shape]}; quantised layers cannot be upcycled"
        )
    bias: Any = layer.bias
    return _Projection(weight if isinstance(layer, nn.Linear) else weight.T, bias)


def _check_layers(dense: _DenseMLP) -> None:
    """The layers fit to one another, and those that are stacked with one another are alike."""
    up = dense.up.weight
    for name, layer in (("down", dense.down), ("gate", dense.gate)):
        if layer is not None and (layer.weight.dtype, layer.weight.device) != (up.dtype, up.device):
            raise ValueError(
                f"mlp: expected its {name} projection in {up.dtype} on {up.device} as its up projection, got "
                f"{layer.weight.dtype} on {layer.weight.device}"
            )
    if dense.is_fused and up.shape[0] % 2:
        raise ValueError(f"mlp: expected its gate_up projection to give two equal halves, got {up.shape[0]} features")
    if dense.down.weight.shape[1] != dense.d_hidden:
        raise ValueError(
            f"mlp: expected its down projection to take the {dense.d_hidden} features that its up projection gives, "
            f"got one that takes {dense.down.weight.shape[1]}"
        )
    if dense.gate is not None:
        actual, expected = (
            {
                name: (list(tensor.shape), tensor.requires_grad)
                for name, tensor in layer._asdict().items()
                if tensor is not None
            }
            for layer in (dense.gate, dense.up)
        )
        if actual != expected:
            raise ValueError(
                "mlp: expected its gate projection to have the (shape, requires_grad) of its up projection, "
                f"{expected}, got {actual}"
            )


@torch.no_grad()
def _check_halves(mlp: nn.Module, dense: _DenseMLP, activation: str) -> None:
    """The activation is applied to the first half of a fused projection: no name says so, but the values do."""
    weight = dense.up.weight
    if weight.is_meta:
        return
    # large, as SiLU and its like are nearly linear about 0, where the halves could be exchanged
    probe = 16 * torch.linspace(0, 20, 4 * weight.shape[1], device=weight.device).sin().view(4, -1).to(weight.dtype)
    training = mlp.training
    actual = mlp.eval()(probe)
    mlp.train(training)
    gate, up = F.linear(probe, *dense.up).chunk(2, dim=-1)
    expected = F.linear(ACTIVATIONS[activation](gate) * up, *dense.down)
    tolerance = max(1e-4, 8 * torch.finfo(weight.dtype).eps)
    if not (actual - expected).float().norm() <= tolerance * expected.float().norm():
        raise ValueError(
            f"mlp: expected down({activation}(first half) * second half) of what its gate_up projection gives, got "
            f"other values from {_describe(mlp)}"
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
    projections: Mapping[str, str] | None = None,
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
        mlp: down(act(up(x))), as an `nn.Sequential` of Linear, activation, Linear, or by the names of its layers; with
            a gate, down(act(gate(x)) * up(x)), also where gate and up are one layer. The names in `PROJECTION_NAMES`
            are known, among them those of CLIP, Llama, Mistral, Phi-3, GLM-4, GPT-2, GPT-NeoX, StarCoder2 and
            ModernBERT of transformers and of timm's Mlp. Its activation is the module or function `activation_fn`,
            `act_fn`, `act` or `activation`, or `config.hidden_act`. It is not changed, nor shares memory with the
            result, which takes over dtype, device, requires_grad, training mode and missing biases.
        num_experts: E.
        top_k: K, experts per token.
        activation: a name in `cumo_kernels.ACTIVATIONS`, where that of `mlp` is to be overridden. By default it is
            recognised by the values that it computes.
        projections: names of the layers, where `mlp` has others: {"up": ..., "down": ...}, with "gate" too, or
            {"gate_up": ..., "down": ...} for one layer whose first half of features the activation is applied to.
        noise: standard deviation of the Gaussian noise added to each expert, relative to that of the tensor it is
            added to. With noise the output is no longer that of `mlp`.
        generator: draws the gate (as a new `nn.Linear`, in float32), then the noise; the same on every device.
        normalize: must be True. Otherwise the weights of a token would sum to less than one, and scale its output.
        router_dtype: see `MoEMLP`.
        probs_dtype: see `MoEMLP`; bfloat16 weights sum to one but for their rounding.
        recompute: see `MoEMLP`.

    Raises:
        ValueError: `mlp` holds something else, quantised layers or dropout; `projections` does not name its layers;
            `normalize` is False; `noise` is negative; or `MoEMLP` refuses an argument.

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
    if isinstance(mlp, nn.Sequential) and projections is None:
        dense = _read_sequential(mlp)
    else:
        dense = _read_named(mlp, projections)
    _check_layers(dense)
    activation = _recognise(dense.activation) if activation is None else activation
    moe = MoEMLP(
        dense.up.weight.shape[1],
        dense.d_hidden,
        dense.down.weight.shape[0],
        num_experts=num_experts,
        top_k=top_k,
        activation=activation,
        gated=dense.gate is not None or dense.is_fused,
        router_dtype=router_dtype,
        probs_dtype=probs_dtype,
        recompute=recompute,
        device="meta",  # nothing is drawn in vain, nor from the global generator
        dtype=dense.up.weight.dtype,
    )
    if dense.is_fused:
        _check_halves(mlp, dense, activation)
    moe.to_empty(device=dense.up.weight.device)
    _fill(moe, dense, noise, generator)
    return moe.train(mlp.training)
