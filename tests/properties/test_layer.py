# SPDX-License-Identifier: Apache-2.0
"""Random cases of `MoEMLP`: output, losses and the gradient of every parameter on both backends against loops in
float64."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from cumo.nn import MoEMLP
from tests.properties import loops
from tests.properties import strategies as some
from tests.properties.agreement import assert_correct, laid_out
from tests.properties.test_gating import near_a_rounding_edge, outputs_used


class Results(NamedTuple):
    """What the layer returns, flat."""

    y: Tensor
    weight_TK: Tensor
    expert_TK: Tensor
    balance_S: Tensor
    z_S: Tensor
    mean_probs_SE: Tensor


def by_loop(moe, compute_dtype, segment, x, residual=None, **parameters):
    """The layer, from the equations: a router in float32 or in `compute_dtype`, experts in the latter."""

    def narrow(tensor):
        return tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(compute_dtype)

    x_TD = x.reshape(-1, x.shape[-1])
    routed = (x_TD, parameters["gate.weight"])
    x_router, gate_ED = map(narrow, routed) if moe.gate.compute_dtype is None else map(loops.wide, routed)
    routing = loops.topk_gating(F.linear(x_router, gate_ED), moe.top_k, segment, moe.normalize, moe.probs_dtype)
    names = ("up_proj", "down_proj", "up_proj_bias", "down_proj_bias")
    experts = [narrow(parameters.get(name)) for name in names]
    fused = residual is not None and residual.dtype in (compute_dtype, torch.float64)
    y_TO = loops.moe_mlp(
        narrow(x_TD),
        routing.weight_TK,
        routing.expert_TK,
        *experts,
        moe.activation,
        moe.gated,
        residual_TO=residual.reshape(-1, moe.d_out) if fused else None,
    )
    y = y_TO.reshape(*x.shape[:-1], moe.d_out)
    return Results(y if residual is None or fused else residual + y, *routing)


@st.composite
def layers(draw, dtype):
    """A layer without values; what rounds in it."""
    E = draw(st.integers(1, 6))
    return MoEMLP(
        draw(some.POSITIVE_WIDTHS),
        draw(some.POSITIVE_WIDTHS),
        draw(st.none() | some.POSITIVE_WIDTHS),
        num_experts=E,
        top_k=draw(st.integers(1, E)),
        activation=draw(some.ACTIVATIONS),
        gated=draw(st.booleans()),
        bias=draw(st.booleans()),
        normalize=draw(st.booleans()),
        router_dtype=draw(st.sampled_from([torch.float32, torch.float32, None])),
        probs_dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16])),
        recompute=draw(st.booleans()),
        dtype=dtype,
    )


@some.examples(8)
@given(data=st.data(), machine=some.machines(), tiles=some.tilings())
def test_moe_mlp_module(data, machine, tiles, device):
    autocast = data.draw(some.AUTOCAST, "autocast")
    dtype = torch.float32 if autocast else data.draw(some.DTYPES, "dtype")
    compute_dtype = autocast or dtype
    moe = data.draw(layers(dtype), "layer").to(device)
    leading = data.draw(st.lists(st.integers(0, 4), max_size=2) | some.TOKENS.map(lambda T: [T]), "leading")
    leading += data.draw(st.lists(st.integers(1, 9), max_size=1), "tokens of an image") if len(leading) > 1 else []
    T = torch.Size(leading).numel()
    assume(T <= 60)
    segment = None if len(leading) > 1 else data.draw(some.segments(T), "segment")
    tensors = {"x": data.draw(some.exact_numbers(*leading, moe.d_in, dtype=dtype))}
    for name, parameter in moe.named_parameters():
        if name == "gate.weight":
            tensors[name] = data.draw(some.exact_numbers(*parameter.shape, dtype=dtype))
        else:  # autocast has nothing left to round
            scale = parameter.shape[-1] ** -0.5 if name.endswith("proj") else 1.0
            tensors[name] = data.draw(some.normals(*parameter.shape, dtype=compute_dtype, scale=scale)).to(dtype)
    if data.draw(st.booleans(), "residual"):
        residual_dtype = data.draw(st.sampled_from([compute_dtype, torch.float32]))
        tensors["residual"] = data.draw(some.normals(*leading, moe.d_out, dtype=residual_dtype))
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    x_TD, gate_ED = tensors["x"].reshape(-1, moe.d_in).float(), tensors["gate.weight"].float()
    assume(not near_a_rounding_edge(x_TD @ gate_ED.T, moe.probs_dtype))

    def public(x, residual=None, **parameters):
        y, routing = torch.func.functional_call(moe, parameters, (x, residual, segment))
        return Results(y, *routing)

    of_an_image = max(leading[-1], 1) if len(leading) > 1 else segment

    def loop(**arguments):
        return by_loop(moe, compute_dtype, of_an_image, **arguments)

    with torch.no_grad():
        outputs = loop(**tensors)._asdict()
    generator = torch.Generator().manual_seed(data.draw(some.SEEDS))
    used = ["y", *data.draw(outputs_used(), "used")]
    cotangents = {name: torch.randn(outputs[name].shape, generator=generator).to(outputs[name]) for name in used}
    wrt = data.draw(some.subsets(list(tensors)), "wrt")
    views = data.draw(some.layouts("x", "up_proj", "down_proj"), "views")
    with some.running_on(machine, tiles):
        assert_correct(
            "MoEMLP",
            laid_out(tensors, views),
            wrt=wrt,
            cotangents=cotangents,
            rounded_to=max(compute_dtype, moe.probs_dtype, key=lambda d: torch.finfo(d).eps),
            autocast=autocast,
            never_cast=tensors,
            decide=["x", "gate.weight"],
            public=public,
            loop=loop,
        )
