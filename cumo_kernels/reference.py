# SPDX-License-Identifier: Apache-2.0
"""The operations in eager PyTorch: the specification, the oracle of the tests and the CPU backend.

Every function has the signature of the public operation of its name and is differentiated by autograd. It
works on the rows of one expert at a time (never on one image or one token), in any floating-point dtype, and
traces under `torch.compile(fullgraph=True)`. On CUDA it reads the expert offsets back to the host.

The same numbers are computed in one of three ways. Eager mode reads the expert offsets and has gradients of its own.
Where there are no values to read (torch.compile, fake and meta tensors), the loops over experts are custom operators.
Under forward-mode differentiation and `torch.func`, everything is composed of PyTorch's own operators, which know every
transform.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, is_fake
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from cumo_kernels.activations import ACTIVATIONS
from cumo_kernels.backend import without_autocast
from cumo_kernels.checks import check_segment
from cumo_kernels.types import DispatchPlan, Routing


class _Mode(Enum):
    EAGER = "eager"
    TRACED = "traced"  # torch.compile, FakeTensorMode, the meta device: there are no values to look at
    TRANSFORMED = "transformed"  # a dual level or a transform of torch.func


def _mode(tensor: Tensor) -> _Mode:
    """How an operation on `tensor` is carried out."""
    if forward_ad._current_level >= 0:
        return _Mode.TRANSFORMED
    if torch.compiler.is_compiling():  # which passes other transforms on to what it traces
        return _Mode.TRACED
    if torch._C._functorch.maybe_current_level() is not None:
        return _Mode.TRANSFORMED
    return _Mode.TRACED if tensor.is_meta or isinstance(tensor, FakeTensor) else _Mode.EAGER


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def topk_gating(
    logits_TE: Tensor,
    top_k: int,
    segment: int | None = None,
    normalize: bool = True,
    probs_dtype: torch.dtype = torch.float32,
) -> Routing:
    """Softmax, top-K, renormalise; balance and z-loss per segment. See `cumo_kernels.topk_gating`."""
    T, E = logits_TE.shape
    segment = check_segment(segment, T)
    S = T // segment if segment else 1
    logits_TE = logits_TE.to(accumulation_dtype(logits_TE.dtype))
    probs_TE = logits_TE.softmax(dim=-1)
    if logits_TE.dtype != torch.float64 or probs_dtype != torch.float32:  # float64 has no coarser "full" precision
        probs_TE = probs_TE.to(probs_dtype)
    # torch.topk leaves the order of ties open; a stable sort does not
    expert_TK = probs_TE.detach().argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    weight_TK = probs_TE.gather(1, expert_TK)
    if normalize:
        weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True)
    first_TE = (expert_TK[:, :1] == torch.arange(E, device=logits_TE.device)).to(logits_TE.dtype)
    tokens = max(segment, 1)  # the losses of no tokens are 0, not 0 / 0
    mean_probs_SE = probs_TE.to(logits_TE.dtype).view(S, segment, E).sum(dim=1) / tokens
    share_SE = first_TE.view(S, segment, E).sum(dim=1) / tokens
    balance_S = E * (mean_probs_SE * share_SE).sum(dim=-1)
    z_S = logits_TE.logsumexp(dim=-1).square().view(S, segment).sum(dim=1) / tokens
    return Routing(weight_TK, expert_TK.int(), balance_S, z_S, mean_probs_SE)


def linear_topk_gating(
    x_TD: Tensor,
    gate_ED: Tensor,
    top_k: int,
    segment: int | None = None,
    normalize: bool = True,
    probs_dtype: torch.dtype = torch.float32,
) -> Routing:
    """Router logits in float32, then `topk_gating`. See `cumo_kernels.linear_topk_gating`."""
    with without_autocast(x_TD.device):
        dtype = accumulation_dtype(x_TD.dtype)
        logits_TE = torch.nn.functional.linear(x_TD.to(dtype), gate_ED.to(dtype))
        return topk_gating(logits_TE, top_k, segment, normalize, probs_dtype)


def plan_dispatch(expert_TK: Tensor, num_experts: int) -> DispatchPlan:
    """Stable sort of the choices by expert. See `cumo_kernels.plan_dispatch`."""
    T, K = expert_TK.shape
    N = T * K
    flat_N = expert_TK.reshape(N)
    key_N = torch.where((flat_N >= 0) & (flat_N < num_experts), flat_N, num_experts)  # ignored ids sort last
    key_N, route_N = key_N.sort(stable=True)
    experts_E1 = torch.arange(num_experts + 1, device=key_N.device, dtype=key_N.dtype)
    offset_E1 = torch.searchsorted(key_N, experts_E1, out_int32=True)
    used_N = key_N < num_experts
    row_N = torch.where(used_N, torch.arange(N, device=key_N.device, dtype=torch.int32), -1)
    slot_N = row_N.scatter(0, route_N, row_N)
    route_N = route_N.int()
    token_N = torch.where(used_N, route_N // K, -1)
    return DispatchPlan(token_N, route_N, slot_N.view(T, K), offset_E1)


class _TakeRows(torch.autograd.Function):
    """out[m] = source[index[m]], zero where index is -1; the adjoint of `_SumRows`.

    `inverse_RJ[r]` lists the rows m that read row r (-1: none). With it the gradient is a gather too, many times
    faster on a CPU than the `index_add` that autograd would use.
    """

    @staticmethod
    def forward(ctx, source_RD: Tensor, index_M: Tensor, inverse_RJ: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(index_M, inverse_RJ)
        return _gather_rows(source_RD, index_M)

    @staticmethod
    def backward(ctx, grad_MD: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        index_M, inverse_RJ = ctx.saved_tensors
        return _SumRows.apply(grad_MD, index_M, inverse_RJ), None, None


class _SumRows(torch.autograd.Function):
    """out[r] = sum_j source[inverse[r, j]], accumulated in float32 in the order of j; the adjoint of `_TakeRows`."""

    @staticmethod
    def forward(ctx, source_MD: Tensor, index_M: Tensor, inverse_RJ: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(index_M, inverse_RJ)
        total_RD, *others = (_gather_rows(source_MD, inverse_R) for inverse_R in inverse_RJ.unbind(dim=1))
        if not others:
            return total_RD
        total_RD = total_RD.to(accumulation_dtype(source_MD.dtype))
        for rows_RD in others:
            total_RD += rows_RD
        return total_RD.to(source_MD.dtype)

    @staticmethod
    def backward(ctx, grad_RD: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        index_M, inverse_RJ = ctx.saved_tensors
        return _TakeRows.apply(grad_RD, index_M, inverse_RJ), None, None


def _gather_rows(source_RD: Tensor, index_M: Tensor) -> Tensor:
    ignored_M = index_M < 0
    # only eager mode can branch on data: the usual case, nothing ignored, saves a pass
    if _mode(index_M) is _Mode.EAGER and not ignored_M.any():
        return source_RD.index_select(0, index_M)
    if source_RD.shape[0] == 0:
        return source_RD.new_zeros(index_M.shape[0], source_RD.shape[1])
    rows_MD = source_RD.index_select(0, index_M.clamp(min=0))
    # torch.compile of PyTorch 2.11 loses the gradient of what is changed in place
    fill = rows_MD.masked_fill_ if _mode(index_M) is _Mode.EAGER else rows_MD.masked_fill
    return fill(ignored_M.unsqueeze(1), 0)


def _take_rows(source_RD: Tensor, index_M: Tensor, inverse_RJ: Tensor) -> Tensor:
    """`_TakeRows`, or without its gradient what PyTorch can transform."""
    if _mode(source_RD) is _Mode.TRANSFORMED:
        return _gather_rows(source_RD, index_M)
    return _TakeRows.apply(source_RD, index_M, inverse_RJ)


def _affine(x_RD: Tensor, w_FD: Tensor, bias_EF: Tensor | None, e: int, out: Tensor | None = None) -> Tensor:
    """x W^T + b[e]."""
    if bias_EF is None:
        return torch.mm(x_RD, w_FD.T, out=out)
    return torch.addmm(bias_EF[e], x_RD, w_FD.T, out=out)


def _linear_rows(x_ND: Tensor, w_EFD: Tensor, bias_EF: Tensor | None, offset_E1: Tensor) -> Tensor:
    """y[n] = x[n] W[e]^T + b[e] over the rows n of expert e, zero in rows of no expert."""
    y_NF = x_ND.new_empty(x_ND.shape[0], w_EFD.shape[1])
    start = 0
    for e, end in enumerate(offset_E1[1:].tolist()):
        if start < end:
            _affine(x_ND[start:end], w_EFD[e], bias_EF, e, out=y_NF[start:end])
        start = end
    y_NF[start:].zero_()
    return y_NF


def _outer_rows(y_NF: Tensor, x_ND: Tensor, offset_E1: Tensor) -> Tensor:
    """dW[e] = sum of the outer products y[n] x[n] over the rows n of expert e."""
    dw_EFD = y_NF.new_empty(offset_E1.shape[0] - 1, y_NF.shape[1], x_ND.shape[1])
    start = 0
    for e, end in enumerate(offset_E1[1:].tolist()):
        torch.mm(y_NF[start:end].T, x_ND[start:end], out=dw_EFD[e])
        start = end
    return dw_EFD


# As operators they hide the loop over experts, whose bounds are data, from torch.compile.
_linear_rows_op = torch.library.custom_op("cumo_kernels::linear_rows_reference", _linear_rows, mutates_args=())
_outer_rows_op = torch.library.custom_op("cumo_kernels::outer_rows_reference", _outer_rows, mutates_args=())
_linear_rows_op.register_fake(lambda x_ND, w_EFD, _bias_EF, _offset_E1: x_ND.new_empty(x_ND.shape[0], w_EFD.shape[1]))
_outer_rows_op.register_fake(
    lambda y_NF, x_ND, offset_E1: y_NF.new_empty(offset_E1.shape[0] - 1, y_NF.shape[1], x_ND.shape[1])
)


class _GroupedLinear(torch.autograd.Function):
    """`_linear_rows`, differentiable any number of times."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, w_EFD: Tensor, bias_EF: Tensor | None, offset_E1: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x_ND, w_EFD, offset_E1)
        op = _linear_rows_op if _mode(x_ND) is _Mode.TRACED else _linear_rows
        return op(x_ND, w_EFD, bias_EF, offset_E1)

    @staticmethod
    def backward(ctx, dy_NF: Tensor):  # type: ignore[no-untyped-def]
        x_ND, w_EFD, offset_E1 = ctx.saved_tensors
        dx_ND = dw_EFD = dbias_EF = None
        if ctx.needs_input_grad[0]:
            dx_ND = _GroupedLinear.apply(dy_NF, w_EFD.transpose(1, 2), None, offset_E1)
        if ctx.needs_input_grad[1]:
            dw_EFD = _GroupedOuter.apply(dy_NF, x_ND, offset_E1)
        if ctx.needs_input_grad[2]:
            dbias_EF = _GroupedOuter.apply(dy_NF, dy_NF.new_ones(dy_NF.shape[0], 1), offset_E1).squeeze(2)
        return dx_ND, dw_EFD, dbias_EF, None


class _GroupedOuter(torch.autograd.Function):
    """`_outer_rows`, differentiable any number of times."""

    @staticmethod
    def forward(ctx, y_NF: Tensor, x_ND: Tensor, offset_E1: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(y_NF, x_ND, offset_E1)
        op = _outer_rows_op if _mode(x_ND) is _Mode.TRACED else _outer_rows
        return op(y_NF, x_ND, offset_E1)

    @staticmethod
    def backward(ctx, grad_EFD: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
        y_NF, x_ND, offset_E1 = ctx.saved_tensors
        dy_NF = _GroupedLinear.apply(x_ND, grad_EFD, None, offset_E1)
        dx_ND = _GroupedLinear.apply(y_NF, grad_EFD.transpose(1, 2), None, offset_E1)
        return dy_NF, dx_ND, None


def _transformable_linear(x_ND: Tensor, w_EFD: Tensor, bias_EF: Tensor | None, offset_E1: Tensor) -> Tensor:
    """`_linear_rows` of PyTorch's own operators."""
    if _readable(offset_E1):
        ends = offset_E1.tolist()
        sizes = [end - start for start, end in zip(ends, ends[1:], strict=False)]
        *x_ERD, tail_RD = x_ND.split([*sizes, x_ND.shape[0] - ends[-1]])
        rows = [_affine(x_RD, w_EFD[e], bias_EF, e) for e, x_RD in enumerate(x_ERD)]
        return torch.cat([*rows, x_ND.new_zeros(tail_RD.shape[0], w_EFD.shape[1])])
    # each expert goes through all rows, with zeros in place of those of others, and its own are kept
    row_N1 = torch.arange(x_ND.shape[0], device=x_ND.device).unsqueeze(1)
    y_NF = x_ND.new_zeros(x_ND.shape[0], w_EFD.shape[1])
    for e in range(w_EFD.shape[0]):
        own_N1 = (row_N1 >= offset_E1[e]) & (row_N1 < offset_E1[e + 1])
        y_NF = torch.where(own_N1, _affine(x_ND.masked_fill(~own_N1, 0), w_EFD[e], bias_EF, e), y_NF)
    return y_NF


def _readable(offset_E1: Tensor) -> bool:
    """Whether the offsets have values, one for all: not under vmap, where each of the mapped cases has its own."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    transforms = functorch.get_interpreter_stack() or []
    vmapped = any(transform.key() == functorch.TransformType.Vmap for transform in transforms)
    return not (vmapped or offset_E1.is_meta or is_fake(offset_E1))


def permute(x_TD: Tensor, plan: DispatchPlan) -> Tensor:
    """Copy tokens into expert-sorted rows. See `cumo_kernels.permute`."""
    return _take_rows(x_TD, plan.token_N, plan.slot_TK)


def grouped_gemm(
    x_ND: Tensor, w_EFD: Tensor, plan: DispatchPlan, bias_EF: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """act(x W[e]^T + b[e]) over the rows of each expert. See `cumo_kernels.grouped_gemm`."""
    linear = _transformable_linear if _mode(x_ND) is _Mode.TRANSFORMED else _GroupedLinear.apply
    z_NF = linear(x_ND, w_EFD, bias_EF, plan.offset_E1)
    return z_NF if activation is None else ACTIVATIONS[activation](z_NF)


def combine(y_NO: Tensor, weight_TK: Tensor, plan: DispatchPlan, residual_TO: Tensor | None = None) -> Tensor:
    """Weighted sum of each token's rows. See `cumo_kernels.combine`."""
    T, K = plan.slot_TK.shape
    dtype = accumulation_dtype(y_NO.dtype)
    slot_N = plan.slot_TK.reshape(T * K)
    if torch.is_grad_enabled() or _mode(y_NO) is not _Mode.EAGER:
        reader_N1 = torch.where(plan.token_N < 0, -1, plan.route_N).unsqueeze(1)
        choice_TKO = _take_rows(y_NO, slot_N, reader_N1).view(T, K, y_NO.shape[1])
    else:
        choice_TKO = _gather_rows(y_NO, slot_N).view(T, K, y_NO.shape[1])
    weight_TK = weight_TK.masked_fill(plan.slot_TK < 0, 0)  # 0 times what an ignored choice weighs may be NaN
    weights_T1 = weight_TK.to(dtype).unsqueeze(2).unbind(1)
    choices_TO = choice_TKO.to(dtype).unbind(1)
    first_TO = weights_T1[0] * choices_TO[0]
    total_TO = first_TO if residual_TO is None else residual_TO + first_TO
    for weight_T1, choice_TO in zip(weights_T1[1:], choices_TO[1:], strict=True):
        total_TO = torch.addcmul(total_TO, weight_T1, choice_TO)
    return total_TO.to(y_NO.dtype)


def moe_mlp(
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    w1_EFD: Tensor,
    w2_EOF: Tensor,
    b1_EF: Tensor | None = None,
    b2_EO: Tensor | None = None,
    activation: str = "gelu",
    gated: bool = False,
    recompute: bool = False,
    residual_TO: Tensor | None = None,
) -> Tensor:
    """permute, two grouped GEMMs with the activation between them, combine. See `cumo_kernels.moe_mlp`."""
    plan = plan_dispatch(expert_TK, w1_EFD.shape[0])
    mode = _mode(x_TD)
    if not torch.is_grad_enabled() and mode is _Mode.EAGER:
        y_NO = _experts_without_graph(x_TD, plan, w1_EFD, w2_EOF, b1_EF, b2_EO, activation, gated)
        return combine(y_NO, weight_TK, plan, residual_TO)

    def experts(x_TD: Tensor) -> Tensor:
        return _activate(grouped_gemm(permute(x_TD, plan), w1_EFD, plan, b1_EF), activation, gated)

    # torch.func refuses the hooks of a checkpoint; what is saved does not change what is computed
    recompute = recompute and mode is not _Mode.TRANSFORMED
    a_NF = checkpoint(experts, x_TD, use_reentrant=False) if recompute else experts(x_TD)
    return combine(grouped_gemm(a_NF, w2_EOF, plan, b2_EO), weight_TK, plan, residual_TO)


def _activate(z_NF: Tensor, activation: str, gated: bool) -> Tensor:
    if gated:
        gate_NF, up_NF = z_NF.chunk(2, dim=-1)
        return ACTIVATIONS[activation](gate_NF) * up_NF
    return ACTIVATIONS[activation](z_NF)


def _experts_without_graph(
    x_TD: Tensor,
    plan: DispatchPlan,
    w1_EFD: Tensor,
    w2_EOF: Tensor,
    b1_EF: Tensor | None,
    b2_EO: Tensor | None,
    activation: str,
    gated: bool,
) -> Tensor:
    """The same rows y_NO, one expert after the other, so that what lies between the two products stays in the cache."""
    y_NO = x_TD.new_empty(plan.token_N.shape[0], w2_EOF.shape[1])
    start = 0
    for e, end in enumerate(plan.offset_E1[1:].tolist()):
        if start < end:
            x_RD = x_TD.index_select(0, plan.token_N[start:end])
            a_RF = _activate(_affine(x_RD, w1_EFD[e], b1_EF, e), activation, gated)
            _affine(a_RF, w2_EOF[e], b2_EO, e, out=y_NO[start:end])
        start = end
    y_NO[start:].zero_()
    return y_NO
