# SPDX-License-Identifier: Apache-2.0
"""A sparse MLP as a module: router and experts, without the policy of losses.

Letters: T tokens, K experts per token, E experts, D input width, F hidden width, O output width, S segments.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cumo_kernels as ck
from cumo_kernels.backend import autocast_dtype, without_autocast
from cumo_kernels.checks import check_count, check_one_of, check_top_k
from cumo_kernels.ops.linear_topk_gating import MAX_EXPERTS as MAX_FUSED_EXPERTS
from cumo_kernels.ops.topk_gating import PROBS_DTYPES


class Gate(nn.Linear):
    """The router's linear layer: `logits[t, e] = <W[e], x[t]>`, with no bias.

    Args:
        d_in: D.
        num_experts: E.
        compute_dtype: float32 to compute in float32 (in float64 for float64) whatever the dtype of the weight, outside
            autocast; None to compute as any linear layer does.
    """

    def __init__(
        self,
        d_in: int,
        num_experts: int,
        compute_dtype: torch.dtype | None = torch.float32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_in, num_experts, bias=False, device=device, dtype=dtype)
        self.compute_dtype = compute_dtype

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., E]."""
        if self.compute_dtype is None:
            return super().forward(x)
        dtype = torch.promote_types(torch.promote_types(x.dtype, self.weight.dtype), self.compute_dtype)
        with without_autocast(x.device):
            return F.linear(x.to(dtype), self.weight.to(dtype))


class MoEMLP(nn.Module):
    """`y[t] = sum_k p[t, k] (W2[e] act(W1[e] x[t] + b1[e]) + b2[e])` over the top-K experts e of token t.

    The experts are stacked, each in the orientation of `nn.Linear`: `up_proj` [E, F, D] ([E, 2F, D] with the rows of
    act's argument first if `gated`), `up_proj_bias` [E, F or 2F], `down_proj` [E, O, F], `down_proj_bias` [E, O]; the
    router is `gate`, a linear layer [E, D]. As in CuMo (arXiv 2405.05949), experts are chosen by softmax, then top-K.

    The module keeps no state between calls: what the router did is returned, so that it survives activation
    checkpointing, sharding and compilation. Losses are made of it by the caller.

    Args:
        d_in: D, width of the input.
        d_hidden: F, width of the hidden layer.
        d_out: O, width of the output; `d_in` if None.
        num_experts: E.
        top_k: K, experts per token, 1 <= K <= E.
        activation: a name in `cumo_kernels.ACTIVATIONS`.
        gated: act(gate) * up in place of act(up), as in SwiGLU (arXiv 2002.05202).
        bias: whether the experts have biases; the router has none.
        normalize: divide the selected probabilities of a token by their sum.
        router_dtype: float32 to compute the logits in float32 whatever the dtype of the module and of autocast; None to
            compute them as any linear layer would, as the published CuMo does in bfloat16.
        probs_dtype: dtype of the probabilities; bfloat16 rounds them before the selection, as the published CuMo does.
        recompute: save the input only, and compute the up projection once more in the backward.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: a size is no positive integer, `top_k` is not in 1..E, or `activation`, `router_dtype` or
            `probs_dtype` is none of those above.

    Examples:
        >>> import torch
        >>> from cumo.nn import MoEMLP
        >>> moe = MoEMLP(8, 16, num_experts=4, top_k=2, activation="quick_gelu")
        >>> {name: tuple(parameter.shape) for name, parameter in moe.named_parameters() if "bias" not in name}
        {'up_proj': (4, 16, 8), 'down_proj': (4, 8, 16), 'gate.weight': (4, 8)}
        >>> x = torch.randn(3, 5, 8)  # images, tokens, width
        >>> y, routing = moe(x, residual=x)
        >>> y.shape, routing.expert_TK.shape, routing.balance_S.shape
        (torch.Size([3, 5, 8]), torch.Size([15, 2]), torch.Size([3]))
        >>> (y.square().mean() + 0.1 * routing.balance_S.mean() + 0.01 * routing.z_S.mean()).backward()
    """

    up_proj_bias: nn.Parameter | None
    down_proj_bias: nn.Parameter | None

    def __init__(
        self,
        d_in: int,
        d_hidden: int,
        d_out: int | None = None,
        *,
        num_experts: int,
        top_k: int,
        activation: str = "gelu",
        gated: bool = False,
        bias: bool = True,
        normalize: bool = True,
        router_dtype: torch.dtype | None = torch.float32,
        probs_dtype: torch.dtype = torch.float32,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        d_out = d_in if d_out is None else d_out
        d_in, d_hidden, d_out, num_experts = (
            check_count(name, size)
            for name, size in dict(d_in=d_in, d_hidden=d_hidden, d_out=d_out, num_experts=num_experts).items()
        )
        top_k = check_top_k(top_k, num_experts)
        check_one_of("activation", activation, ck.ACTIVATIONS)
        check_one_of("router_dtype", router_dtype, (torch.float32, None))
        check_one_of("probs_dtype", probs_dtype, PROBS_DTYPES)
        self.d_in, self.d_hidden, self.d_out = d_in, d_hidden, d_out
        self.num_experts, self.top_k = num_experts, top_k
        self.activation, self.gated = activation, gated
        self.normalize, self.probs_dtype, self.recompute = normalize, probs_dtype, recompute

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape, device=device, dtype=dtype))

        d_up = 2 * d_hidden if gated else d_hidden
        self.gate = Gate(d_in, num_experts, router_dtype, device, dtype)
        self.up_proj = parameter(d_up, d_in)
        self.down_proj = parameter(d_out, d_hidden)
        self.up_proj_bias = parameter(d_up) if bias else None
        self.down_proj_bias = parameter(d_out) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the gate and each expert as `nn.Linear` would: U(-1 / sqrt(fan_in), 1 / sqrt(fan_in))."""
        self.gate.reset_parameters()
        for weight, bias in ((self.up_proj, self.up_proj_bias), (self.down_proj, self.down_proj_bias)):
            bound = weight.shape[-1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, segment: int | None = None
    ) -> tuple[Tensor, ck.Routing]:
        """Send every token to its experts.

        Args:
            x: [..., D] tokens in the dtype of the module, or of any floating-point dtype under autocast.
            residual: [..., O] added to the output, or None. In the dtype of the output it is added within the last
                kernel, before the rounding; otherwise the sum has the wider dtype.
            segment: tokens over which the losses are averaged, a divisor of the number of tokens. By default the size
                of the last but one dimension (one image, as the published CuMo has it) if `x` has three or more
                dimensions, else all tokens.

        Returns:
            y [..., O], and the `cumo_kernels.Routing` of the flattened tokens: weights and experts of each, and the
            losses of each segment in the order of the images; of no segment where there are no images or empty ones.

        Raises:
            ValueError: `x` has another width or dtype, `residual` another shape than the output, or `segment` does not
                divide the number of tokens.
        """
        if x.dim() == 0 or x.shape[-1] != self.d_in:
            raise ValueError(f"x: expected shape [..., {self.d_in}] (d_in), got {list(x.shape)}")
        weights = self.up_proj.dtype
        if x.dtype != weights and (autocast_dtype(x.device) is None or not x.is_floating_point()):
            raise ValueError(f"x: expected dtype {weights} as the module's parameters (or autocast), got {x.dtype}")
        y_shape = (*x.shape[:-1], self.d_out)
        if residual is not None and residual.shape != y_shape:
            raise ValueError(f"residual: expected shape {list(y_shape)} of the output, got {list(residual.shape)}")
        if segment is None and x.dim() > 2:
            segment = max(x.shape[-2], 1)  # images without tokens make no segment of size 0, but no segments
        x_TD = x.reshape(-1, self.d_in)
        routing = self._route(x_TD, segment)
        fused = residual is not None and residual.dtype == _compute_dtype(x)
        y_TO = ck.moe_mlp(
            x_TD,
            routing.weight_TK,
            routing.expert_TK,
            self.up_proj,
            self.down_proj,
            self.up_proj_bias,
            self.down_proj_bias,
            self.activation,
            self.gated,
            self.recompute,
            residual.reshape(-1, self.d_out) if residual is not None and fused else None,
        )
        y = y_TO.reshape(y_shape)
        return y if residual is None or fused else residual + y, routing

    def _route(self, x_TD: Tensor, segment: int | None) -> ck.Routing:
        options = (self.top_k, segment, self.normalize, self.probs_dtype)
        gate = self.gate
        # the fused operation reads the tokens once; it knows the weight alone, so that a gate that was replaced or
        # wrapped (LoRA, FSDP2) is called as a module
        if type(gate) is Gate and gate.compute_dtype is not None and self.num_experts <= MAX_FUSED_EXPERTS:
            return ck.linear_topk_gating(x_TD, gate.weight, *options)
        return ck.topk_gating(gate(x_TD), *options)

    def extra_repr(self) -> str:
        """The arguments of the constructor."""
        shown = ("num_experts", "top_k", "activation", "gated", "normalize", "probs_dtype", "recompute")
        biases = [name for name in ("up_proj_bias", "down_proj_bias") if getattr(self, name) is not None]
        return ", ".join(
            [
                f"{self.d_in}, {self.d_hidden}, {self.d_out}",
                *(f"{name}={getattr(self, name)}" for name in shown),
                f"router_dtype={self.gate.compute_dtype}",
                f"bias={biases if len(biases) == 1 else bool(biases)}",
            ]
        )


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Dtype of a linear layer's output for the input `x`."""
    dtype = autocast_dtype(x.device)
    return x.dtype if dtype is None or x.dtype == torch.float64 else dtype


def expert_load(routing: ck.Routing, num_experts: int) -> Tensor:
    """Share of all choices (first, second, ...) that went to each expert: [E] float32, no gradient.

    Sums to 1, or to 0 where there are no tokens; ids outside 0..E-1 are left out. Does not wait for the device.

    Args:
        routing: of a layer.
        num_experts: E.

    Raises:
        ValueError: `num_experts` is no positive integer.

    Examples:
        >>> import torch, cumo_kernels as ck
        >>> from cumo.nn import expert_load
        >>> routing = ck.topk_gating(torch.tensor([[3.0, 2.0, 1.0], [3.0, 1.0, 2.0]]), top_k=2)
        >>> expert_load(routing, 3).tolist()
        [0.5, 0.25, 0.25]
    """
    offset_E1 = ck.plan_dispatch(routing.expert_TK, num_experts).offset_E1
    return offset_E1.diff() / offset_E1[-1].clamp(min=1)
