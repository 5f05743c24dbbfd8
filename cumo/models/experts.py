# SPDX-License-Identifier: Apache-2.0
"""The experts of transformers' Mixture-of-Experts models (5.17 or newer) on `cumo_kernels`.

Importing this module registers the experts implementation "cumo"; see `cumo.integrations.transformers`.

Parameters, checkpoints, routers and shared experts stay those of the model. Experts whose activation the kernels know
run "fused", as one `cumo_kernels.moe_mlp`. Where a module has a gate, a norm or an activation of its own, that part is
called as it is, between the same kernels: "composed". A few models (llama4, dbrx and jetmoe, for instance) bring
experts outside of transformers' interface; it ignores the choice for them, and `execution_paths` says so.

Letters: T tokens, K experts per token, N = T * K rows sorted by expert, E experts, H hidden size, I intermediate size,
F = 2 * I with a gate, else I.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import activations
from transformers.integrations.moe import ExpertsInterface, _default_apply_gate

import cumo_kernels as ck
from cumo_kernels.checks import FLOAT_DTYPES

NAME = "cumo"

# What `use_experts_implementation` sets on every instance, in all versions.
_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")

# What activations compute, by the names of `cumo_kernels.ACTIVATIONS`. Variants of one function differ in rounding.
_NAME_OF_CLASS: dict[type[nn.Module], str] = {
    nn.SiLU: "silu",
    nn.ReLU: "relu",
    activations.SiLUActivation: "silu",
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
    activations.FastGELUActivation: "gelu_tanh",
    activations.AccurateGELUActivation: "gelu_tanh",
    activations.QuickGELUActivation: "quick_gelu",
    activations.ReLUSquaredActivation: "relu2",
}
_NAME_OF_FUNCTION: tuple[tuple[Callable[..., Tensor], str], ...] = (
    (F.silu, "silu"),
    (F.gelu, "gelu"),
    (F.relu, "relu"),
)


class ExpertsModule(Protocol):
    """An instance of a class decorated with transformers' `use_experts_implementation`.

    Its parameters are `gate_up_proj` [E, F, H] (`up_proj` without a gate) and `down_proj` [E, H, I], both with the last
    two dimensions swapped if `is_transposed`, and with `has_bias` those names with "_bias", [E, F] and [E, H].
    """

    has_gate: bool
    has_bias: bool
    is_transposed: bool
    is_concatenated: bool
    """Gate and up projections are the two halves of `gate_up_proj`; otherwise `_apply_gate` knows which are which."""
    num_experts: int
    """E, in this process."""
    down_proj: Tensor
    act_fn: Callable[[Tensor], Tensor]
    """May be absent where `_apply_gate` is overridden."""
    post_expert_norm: Callable[[Tensor], Tensor]
    """Present with the flag `has_post_expert_norm`, which came with transformers 5.23."""

    def _apply_gate(self, gate_up_out: Tensor, /) -> Tensor: ...


class _Weights(NamedTuple):
    """The parameters of an experts module, each expert as in `nn.Linear`."""

    up_EFH: Tensor
    down_EHI: Tensor
    up_bias_EF: Tensor | None
    down_bias_EH: Tensor | None


def activation_name(act_fn: Callable[..., Tensor]) -> str | None:
    """The name in `cumo_kernels.ACTIVATIONS` of what `act_fn` computes; None if that is known only by calling it."""
    if not isinstance(act_fn, nn.Module):
        return next((name for function, name in _NAME_OF_FUNCTION if act_fn is function), None)
    hooks = act_fn._forward_hooks, act_fn._forward_pre_hooks, act_fn._backward_hooks, act_fn._backward_pre_hooks
    if any(hooks) or "forward" in vars(act_fn):  # somebody watches it, or replaced what it does
        return None
    if type(act_fn) is nn.GELU:
        return "gelu" if act_fn.approximate == "none" else "gelu_tanh"
    return _NAME_OF_CLASS.get(type(act_fn))


def _has_own_gate(module: ExpertsModule) -> bool:
    """Whether the gate is overridden by the class or on the instance, and not act_fn(gate) * up."""
    return type(module)._apply_gate is not _default_apply_gate or "_apply_gate" in vars(module)


def _has_post_norm(module: ExpertsModule) -> bool:
    return getattr(module, "has_post_expert_norm", False)


def _up_name(module: ExpertsModule) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def _fused_activation(module: ExpertsModule) -> str | None:
    """The activation with which `cumo_kernels.moe_mlp` computes what `module` does; None if it cannot."""
    if _has_post_norm(module) or (module.has_gate and _has_own_gate(module)):
        return None
    return activation_name(module.act_fn)


def check_supported(module: Any) -> None:
    """Raise unless `module` is an experts module that `experts_forward` can run.

    Args:
        module: an instance of a class decorated with transformers' `use_experts_implementation`.

    Raises:
        ValueError: `module` is none, or has not got what its flags say.
        NotImplementedError: its parameters are quantized, distributed, or laid out in an unknown way.
    """
    name = type(module).__name__
    missing = [flag for flag in _FLAGS if not hasattr(module, flag)]
    if missing:
        raise ValueError(
            f"{name}: expected a module of a class decorated with transformers' use_experts_implementation, "
            f"which sets {', '.join(_FLAGS)}; got one without {', '.join(missing)}"
        )
    if not (module.has_gate and _has_own_gate(module)):
        if module.has_gate and not module.is_concatenated:
            raise NotImplementedError(
                f"{name}: got is_concatenated=False, expected an _apply_gate of its own that tells gate and up "
                "projections apart: the default one takes the halves of concatenated ones"
            )
        if not callable(getattr(module, "act_fn", None)):
            raise ValueError(f"{name}: expected a callable act_fn, got {getattr(module, 'act_fn', None)!r}")
    for projection in (_up_name(module), "down_proj"):
        _check_parameter(module, projection, 3)
        if module.has_bias:
            _check_parameter(module, f"{projection}_bias", 2)


def _check_parameter(module: ExpertsModule, name: str, dimensions: int) -> None:
    parameter, full_name = getattr(module, name, None), f"{type(module).__name__}.{name}"
    if not isinstance(parameter, Tensor):
        raise ValueError(f"{full_name}: expected a tensor, got {type(parameter).__name__}")
    if is_traceable_wrapper_subclass(parameter):
        raise NotImplementedError(
            f"{full_name}: expected a plain tensor with the experts of this process, got {type(parameter).__name__}"
        )
    if parameter.dtype not in FLOAT_DTYPES:
        raise NotImplementedError(
            f"{full_name}: expected float16, bfloat16, float32 or float64, got {parameter.dtype}; "
            "quantized experts are not supported"
        )
    if parameter.dim() != dimensions or parameter.shape[0] != module.num_experts:
        raise ValueError(
            f"{full_name}: expected {dimensions} dimensions, of which the first is num_experts={module.num_experts}, "
            f"got shape {list(parameter.shape)}"
        )


def _weights_of(module: ExpertsModule) -> _Weights:
    names = _up_name(module), "down_proj"
    weights = [getattr(module, name) for name in names]
    if module.is_transposed:  # views, which the kernels read in place
        weights = [weight.transpose(1, 2) for weight in weights]
    return _Weights(*weights, *(getattr(module, f"{name}_bias") if module.has_bias else None for name in names))


def experts_forward(self: ExpertsModule, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """`y[t] = sum_k weight[t, k] expert[index[t, k]](hidden[t])`: what transformers calls for "cumo".

    Args:
        self: the experts module.
        hidden_states: [T, H] in the dtype of the parameters; under autocast in any.
        top_k_index: [T, K] ids of experts, int32 or int64. Ids outside 0..E-1, the sentinels of expert parallelism, are
            left out.
        top_k_weights: [T, K] of any floating-point dtype.

    Returns:
        [T, H] in the dtype of `hidden_states`.

    Raises:
        ValueError: `self` is no experts module, or `hidden_states`, `top_k_index` or `top_k_weights` has another shape,
            dtype or device than the weights ask for.
        NotImplementedError: see `check_supported`.
    """
    check_supported(self)
    weights, activation = _weights_of(self), _fused_activation(self)
    if activation is None:
        y_TH = _composed(self, weights, hidden_states, top_k_index, top_k_weights)
    else:
        y_TH = ck.moe_mlp(
            hidden_states, top_k_weights, top_k_index, *weights, activation=activation, gated=self.has_gate
        )
    return y_TH.to(hidden_states.dtype)


def _composed(module: ExpertsModule, weights: _Weights, x_TH: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """The layer in its parts, with what the module itself does between them."""
    plan = ck.plan_dispatch(expert_TK, module.num_experts)
    z_NF = ck.grouped_gemm(ck.permute(x_TH, plan), weights.up_EFH, plan, weights.up_bias_EF)
    a_NI = module._apply_gate(z_NF) if module.has_gate else module.act_fn(z_NF)
    y_NH = ck.grouped_gemm(a_NI, weights.down_EHI, plan, weights.down_bias_EH)
    if _has_post_norm(module):
        y_NH = module.post_expert_norm(y_NH)
    return ck.combine(y_NH, weight_TK, plan)


def execution_paths(model: nn.Module) -> dict[str, Literal["fused", "composed"]]:
    """How each experts module of `model` that is set to "cumo" runs, by its name in the model.

    Raises:
        ValueError, NotImplementedError: one of them cannot run; see `check_supported`.
        ValueError: `model` has no experts module that is set to "cumo". The choice was not made, or transformers
            ignored it, as it does for models without its experts interface.
    """
    paths: dict[str, Literal["fused", "composed"]] = {}
    module: Any
    for name, module in model.named_modules():
        chosen = getattr(getattr(module, "config", None), "_experts_implementation", None)
        if chosen == NAME and all(hasattr(module, flag) for flag in _FLAGS):
            check_supported(module)
            paths[name] = "composed" if _fused_activation(module) is None else "fused"
    if not paths:
        raise ValueError(
            f"{type(model).__name__}: expected experts set to {NAME!r}, as by set_experts_implementation({NAME!r}); "
            "got a model in which none are"
        )
    return paths


ExpertsInterface.register(NAME, experts_forward)
