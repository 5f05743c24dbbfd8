# SPDX-License-Identifier: Apache-2.0
"""Random cases of the grouped GEMM and of the fused layer: outputs and every gradient on both backends against loops
in float64."""

from hypothesis import given
from hypothesis import strategies as st

from cumo_kernels import reference
from tests.properties import strategies as some
from tests.properties.agreement import assert_correct, cast, cotangents_of, laid_out

EXPERTS = st.integers(1, 6)


@st.composite
def optional(draw, tensors):
    """A tensor, more often than none."""
    return draw(tensors) if draw(st.integers(0, 3)) else None


def on(device, tensors):
    return {name: tensor if tensor is None else tensor.to(device) for name, tensor in tensors.items()}


@some.examples(8)
@given(data=st.data(), machine=some.machines(), tiles=some.tilings())
def test_grouped_gemm(data, machine, tiles, device):
    T, K, E = data.draw(some.TOKENS, "T"), data.draw(st.integers(1, 2), "K"), data.draw(EXPERTS, "E")
    D, F = data.draw(some.WIDTHS, "D"), data.draw(some.WIDTHS, "F")
    dtype, autocast = data.draw(some.DTYPES, "dtype"), data.draw(some.AUTOCAST, "autocast")
    activation = data.draw(st.none() | some.ACTIVATIONS, "activation")
    plan = reference.plan_dispatch(data.draw(some.expert_ids(T, K, E), "ids").to(device), E)
    tensors = on(
        device,
        {
            "x_ND": data.draw(some.normals(T * K, D, dtype=dtype)),
            "w_EFD": data.draw(some.normals(E, F, D, dtype=dtype, scale=max(D, 1) ** -0.5)),
            "bias_EF": data.draw(optional(some.normals(E, F, dtype=dtype)), "bias"),
        },
    )
    constants = {"plan": plan, "activation": activation}
    cotangents = cotangents_of("grouped_gemm", cast(tensors, autocast), data.draw(some.SEEDS), **constants)
    cotangents = laid_out(cotangents, data.draw(some.layouts("out", of_gradients=True), "view of the gradient"))
    wrt = data.draw(some.subsets([name for name, tensor in tensors.items() if tensor is not None]), "wrt")
    tensors = laid_out(tensors, data.draw(some.layouts(*tensors), "views"))
    with some.running_on(machine, tiles):
        assert_correct(
            "grouped_gemm",
            tensors,
            wrt=wrt,
            cotangents=cotangents,
            rounded_to=autocast or dtype,
            autocast=autocast,
            **constants,
        )


@some.examples(10)
@given(data=st.data(), machine=some.machines(), tiles=some.tilings())
def test_moe_mlp(data, machine, tiles, device):
    T, K, E = data.draw(some.TOKENS, "T"), data.draw(st.integers(1, 4), "K"), data.draw(EXPERTS, "E")
    D, F, O = data.draw(some.WIDTHS, "D"), data.draw(some.WIDTHS, "F"), data.draw(some.WIDTHS, "O")
    dtype, weight_dtype = data.draw(some.DTYPES, "dtype"), data.draw(some.DTYPES, "dtype of weights")
    autocast, gated = data.draw(some.AUTOCAST, "autocast"), data.draw(st.booleans(), "gated")
    F1 = 2 * F if gated else F
    tensors = on(
        device,
        {
            "x_TD": data.draw(some.normals(T, D, dtype=dtype)),
            "weight_TK": data.draw(some.gate_weights(T, K, weight_dtype), "weights"),
            "expert_TK": data.draw(some.expert_ids(T, K, E), "ids"),
            "w1_EFD": data.draw(some.normals(E, F1, D, dtype=dtype, scale=max(D, 1) ** -0.5)),
            "w2_EOF": data.draw(some.normals(E, O, F, dtype=dtype, scale=max(F, 1) ** -0.5)),
            "b1_EF": data.draw(optional(some.normals(E, F1, dtype=dtype)), "b1"),
            "b2_EO": data.draw(optional(some.normals(E, O, dtype=dtype)), "b2"),
            "residual_TO": data.draw(optional(some.normals(T, O, dtype=autocast or dtype)), "residual"),
        },
    )
    constants = {"gated": gated, "activation": data.draw(some.ACTIVATIONS), "recompute": data.draw(st.booleans())}
    leave = ("weight_TK", "residual_TO")
    cotangents = cotangents_of("moe_mlp", cast(tensors, autocast, leave), data.draw(some.SEEDS), **constants)
    cotangents = laid_out(cotangents, data.draw(some.layouts("out", of_gradients=True), "view of the gradient"))
    floating = [name for name, tensor in tensors.items() if tensor is not None and tensor.is_floating_point()]
    wrt = data.draw(some.subsets(floating), "wrt")
    tensors = laid_out(tensors, data.draw(some.layouts(*floating), "views"))
    with some.running_on(machine, tiles):
        assert_correct(
            "moe_mlp",
            tensors,
            wrt=wrt,
            cotangents=cotangents,
            rounded_to=autocast or dtype,
            autocast=autocast,
            never_cast=leave,
            **constants,
        )
