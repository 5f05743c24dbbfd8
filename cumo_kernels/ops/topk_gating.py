# SPDX-License-Identifier: Apache-2.0
"""Top-K gating with its auxiliary losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cumo_kernels import reference
from cumo_kernels.backend import backend_for
from cumo_kernels.checks import check_floating, check_one_of, check_segment, check_shapes, check_top_k
from cumo_kernels.ops.common import check_kernel_dtype, refuse_double_backward, refuse_transforms
from cumo_kernels.types import Routing

PROBS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_EXPERTS = 1024  # a row of logits is in the registers of one program


@torch.library.custom_op("cumo_kernels::topk_gating", mutates_args=())
def _topk_gating(
    logits_TE: Tensor, top_k: int, segment: int, normalize: bool, probs_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from cumo_kernels.kernels.gating import topk_gating_forward

    return topk_gating_forward(logits_TE, top_k, segment, normalize, probs_dtype)


@_topk_gating.register_fake
def _(
    logits_TE: Tensor,
    top_k: int,
    segment: int,
    normalize: bool,
    probs_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from cumo_kernels.kernels.gating import new_routing

    return new_routing(logits_TE, logits_TE.shape[1], top_k, segment, probs_dtype)


@torch.library.custom_op("cumo_kernels::topk_gating_backward", mutates_args=())
def topk_gating_backward(
    logits_TE: Tensor,
    expert_TK: Tensor,
    share_SE: Tensor,
    dweight_TK: Tensor | None,
    dbalance_S: Tensor | None,
    dz_S: Tensor | None,
    dprobs_SE: Tensor | None,
    segment: int,
    normalize: bool,
) -> Tensor:
    """The gradient of the logits."""
    from cumo_kernels.kernels.gating import topk_gating_backward

    return topk_gating_backward(
        logits_TE, expert_TK, share_SE, dweight_TK, dbalance_S, dz_S, dprobs_SE, segment, normalize
    )


@topk_gating_backward.register_fake
def _(logits_TE: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits_TE, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    logits_TE, _, ctx.segment, ctx.normalize, _ = inputs
    _, expert_TK, *_, share_SE = output
    ctx.mark_non_differentiable(expert_TK, share_SE)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits_TE, expert_TK, share_SE)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    dweight_TK, _, dbalance_S, dz_S, dprobs_SE, _ = grads
    saved = ctx.saved_tensors
    dlogits_TE = topk_gating_backward(*saved, dweight_TK, dbalance_S, dz_S, dprobs_SE, ctx.segment, ctx.normalize)
    return dlogits_TE, None, None, None, None


_topk_gating.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward(topk_gating_backward, "topk_gating")


def topk_gating(
    logits_TE: Tensor,
    top_k: int,
    segment: int | None = None,
    normalize: bool = True,
    probs_dtype: torch.dtype = torch.float32,
) -> Routing:
    """Route every token to its `top_k` most probable experts, and compute the auxiliary losses of the routing.

    p = softmax(logits) in float32, rounded to `probs_dtype`. The K largest are selected, the lower index first where
    they are equal, and divided by their sum (in `probs_dtype`) if `normalize`. The balance loss (Switch, arXiv
    2101.03961, eq. 4, over first choices as in CuMo, arXiv 2405.05949) and the z-loss (ST-MoE, arXiv 2202.08906, eq. 5)
    are computed per segment in the same pass. Gradients flow through the weights, the mean probabilities and the
    logsumexp, not through the selection. A token with a NaN logit gets NaN weights.

    Args:
        logits_TE: [T, E] router logits, any floating-point dtype (float64 on the reference backend only).
        top_k: K, 1 <= K <= E.
        segment: tokens per segment (an image), a divisor of T; None for one segment of all tokens, even of none.
        normalize: divide the selected probabilities by their sum.
        probs_dtype: float32, or bfloat16 / float16 to round the probabilities before the selection as the published
            CuMo does in bfloat16. With float64 logits, float32 means "not rounded".

    Returns:
        `Routing` with weight_TK in `probs_dtype`, expert_TK int32, and balance_S, z_S and mean_probs_SE in float32; for
        float64 logits the losses and mean_probs_SE are float64, and so is weight_TK if `probs_dtype` is float32.
        S = T / segment: no tokens make no segment, and the mean over no segment, `balance_S.mean()`, is NaN.

    Raises:
        ValueError: an argument does not fit; on the triton backend, more than 1024 experts or float64.
        RuntimeError: on the triton backend, a second derivative, forward-mode differentiation or `torch.func.grad`.

    Examples:
        >>> import torch, cumo_kernels as ck
        >>> routing = ck.topk_gating(torch.tensor([[1.0, 3.0, 2.0], [0.0, 2.0, 2.0]]), top_k=2)
        >>> routing.expert_TK.tolist()  # most probable first; the tie goes to the lower index
        [[1, 2], [1, 2]]
        >>> routing.weight_TK[1].tolist()
        [0.5, 0.5]
        >>> even = ck.topk_gating(torch.eye(4), top_k=1)  # four tokens, each to an expert of its own
        >>> round(even.balance_S.item(), 4)  # the balance loss of an even load
        1.0
    """
    size = check_shapes(logits_TE=(logits_TE, "T E"))
    check_floating(logits_TE=logits_TE)
    top_k = check_top_k(top_k, size["E"])
    check_one_of("probs_dtype", probs_dtype, PROBS_DTYPES)
    tokens = check_segment(segment, size["T"])
    if backend_for(logits_TE) == "reference":
        return reference.topk_gating(logits_TE, top_k, segment, normalize, probs_dtype)
    check_kernel_dtype("logits_TE", logits_TE)
    if size["E"] > MAX_EXPERTS:
        raise ValueError(
            f"logits_TE: the triton backend expects at most {MAX_EXPERTS} experts, got {size['E']}; "
            "use_backend('reference') takes any number"
        )
    refuse_transforms("topk_gating", logits_TE)
    return Routing(*_topk_gating(logits_TE, top_k, tokens, normalize, probs_dtype)[:5])
