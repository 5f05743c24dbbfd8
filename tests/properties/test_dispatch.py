# SPDX-License-Identifier: Apache-2.0
"""Random cases of the plan, and of what moves rows by it, on both backends."""

import torch
from hypothesis import given
from hypothesis import strategies as st

import cumo_kernels as ck
from cumo_kernels import reference
from tests import oracles
from tests.numerics import assert_bitwise_equal
from tests.properties import strategies as some
from tests.properties.agreement import assert_correct, cotangents_of, laid_out

K_AND_E = st.tuples(st.integers(1, 5), st.integers(1, 12))


@some.examples(20)
@given(data=st.data(), machine=some.machines(), tiles=some.tilings())
def test_plan_dispatch(data, machine, tiles, device):
    T, (K, E) = data.draw(some.TOKENS, "T"), data.draw(K_AND_E, "K, E")
    expert_TK = data.draw(some.expert_ids(T, K, E), "ids")
    expected = oracles.plan(expert_TK, E)
    for backend in ("reference", "triton"):
        with ck.use_backend(backend), some.running_on(machine, tiles):
            plan = ck.plan_dispatch(expert_TK.to(device), E)
        plan.validate()
        assert_bitwise_equal({name: field.cpu() for name, field in plan._asdict().items()}, expected)


@some.examples(10)
@given(data=st.data(), machine=some.machines(), tiles=some.tilings())
def test_permute(data, machine, tiles, device):
    T, (K, E) = data.draw(some.TOKENS, "T"), data.draw(K_AND_E, "K, E")
    dtype, D = data.draw(some.DTYPES, "dtype"), data.draw(some.WIDTHS, "D")
    plan = reference.plan_dispatch(data.draw(some.expert_ids(T, K, E), "ids").to(device), E)
    tensors = {"x_TD": data.draw(some.normals(T, D, dtype=dtype)).to(device)}
    if T and data.draw(st.booleans(), "nan"):
        tensors["x_TD"][0] = torch.nan
    cotangents = cotangents_of("permute", tensors, data.draw(some.SEEDS), plan=plan)
    cotangents = laid_out(cotangents, data.draw(some.layouts("out", of_gradients=True), "view of the gradient"))
    tensors = laid_out(tensors, data.draw(some.layouts("x_TD"), "views"))
    with some.running_on(machine, tiles):
        assert_correct("permute", tensors, wrt=["x_TD"], cotangents=cotangents, rounded_to=dtype, plan=plan)


@some.examples(10)
@given(data=st.data(), machine=some.machines(), tiles=some.tilings())
def test_combine(data, machine, tiles, device):
    T, (K, E) = data.draw(some.TOKENS, "T"), data.draw(K_AND_E, "K, E")
    dtype, weight_dtype, O = (
        data.draw(some.DTYPES, "dtype"),
        data.draw(some.DTYPES, "of weights"),
        data.draw(some.WIDTHS),
    )
    plan = reference.plan_dispatch(data.draw(some.expert_ids(T, K, E), "ids").to(device), E)
    tensors = {
        "y_NO": data.draw(some.normals(T * K, O, dtype=dtype)).to(device),
        "weight_TK": data.draw(some.gate_weights(T, K, weight_dtype)).to(device),
        "residual_TO": data.draw(st.none() | some.normals(T, O, dtype=dtype), "residual"),
    }
    if tensors["residual_TO"] is not None:
        tensors["residual_TO"] = tensors["residual_TO"].to(device)
    cotangents = cotangents_of("combine", tensors, data.draw(some.SEEDS), plan=plan)
    cotangents = laid_out(cotangents, data.draw(some.layouts("out", of_gradients=True), "view of the gradient"))
    wrt = data.draw(some.subsets([name for name, tensor in tensors.items() if tensor is not None]), "wrt")
    tensors = laid_out(tensors, data.draw(some.layouts(*tensors), "views"))
    with some.running_on(machine, tiles):
        assert_correct("combine", tensors, wrt=wrt, cotangents=cotangents, rounded_to=dtype, plan=plan)
