# SPDX-License-Identifier: Apache-2.0
"""Random cases of the two gatings: routing, losses and every gradient on both backends against loops in float64."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.properties import strategies as some
from tests.properties.agreement import assert_correct, cotangents_of, laid_out

# NumPy, which carries out the kernels in the interpreter, warns of what is tried here.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|overflow|divide by zero|All-NaN slice) encountered:RuntimeWarning"
)

OUTPUTS = ["weight_TK", "balance_S", "z_S", "mean_probs_SE"]


@st.composite
def gatings(draw, T, E):
    """Arguments of either gating beside its tensors."""
    return {
        "top_k": draw(st.sampled_from([1, E]) | st.integers(1, E)),
        "segment": draw(some.segments(T)),
        "normalize": draw(st.booleans()),
        "probs_dtype": draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16])),
    }


def outputs_used():
    """Outputs that a gradient comes back to, the z-loss among them. The other gradients are differences of what may be
    almost equal, or is: the one weight of a token is 1, divided by itself, and the balance of one that is certain of
    its expert is constant. Rounding is all that they then are, and that of the z-loss has to give it a measure."""
    return some.subsets(OUTPUTS).map(lambda used: sorted({*used, "z_S"}, key=OUTPUTS.index))


@st.composite
def logits(draw, T, E):
    """Multiples of 1/8, among which there are ties; far apart, all the same, or with a token of NaN."""
    kind = draw(st.sampled_from(["usual", "few values", "far apart", "extreme", "nan"]))
    generator = torch.Generator().manual_seed(draw(some.SEEDS))
    values = (torch.randn(T, E, generator=generator) * 8).round() / 8
    if kind == "few values":
        values = values.clamp(-0.125, 0.125)
    elif kind == "far apart":
        values = values * 64
    elif kind == "extreme":
        values = values.sign() * 1e4
    elif kind == "nan" and T:
        values[draw(st.integers(0, T - 1)), draw(st.integers(0, E - 1))] = torch.nan
    return values.to(draw(some.DTYPES))


def near_a_rounding_edge(logits_TE, probs_dtype):
    """Whether a probability is so near to the middle of two numbers of `probs_dtype` that the error of a softmax in
    float32 decides which of them it becomes, and so perhaps which expert is chosen."""
    if probs_dtype == torch.float32:
        return False
    probs_TE = logits_TE.double().softmax(dim=1)
    low_TE, high_TE = ((probs_TE * (1 + error)).to(probs_dtype).nan_to_num(2.0) for error in (-(2**-16), 2**-16))
    return not torch.equal(low_TE, high_TE)


@some.examples(16)
@given(data=st.data(), machine=some.machines(), tiles=some.tilings())
def test_topk_gating(data, machine, tiles, device):
    T, E = data.draw(some.TOKENS, "T"), data.draw(st.integers(1, 12), "E")
    constants = data.draw(gatings(T, E), "constants")
    tensors = {"logits_TE": data.draw(logits(T, E), "logits").to(device)}
    assume(not near_a_rounding_edge(tensors["logits_TE"], constants["probs_dtype"]))
    cotangents = cotangents_of("topk_gating", tensors, data.draw(some.SEEDS), **constants)
    cotangents = {name: cotangents[name] for name in data.draw(outputs_used(), "used")}
    views = data.draw(some.layouts("logits_TE"), "views")
    views_of_gradients = data.draw(some.layouts(*cotangents, of_gradients=True), "views of gradients")
    with some.running_on(machine, tiles):
        assert_correct(
            "topk_gating",
            laid_out(tensors, views),
            wrt=["logits_TE"],
            decide=tensors,
            cotangents=laid_out(cotangents, views_of_gradients),
            rounded_to=max(tensors["logits_TE"].dtype, constants["probs_dtype"], key=lambda d: torch.finfo(d).eps),
            **constants,
        )


@some.examples(12)
@given(data=st.data(), machine=some.machines(), tiles=some.tilings())
def test_linear_topk_gating(data, machine, tiles, device):
    T, D, E = data.draw(some.TOKENS, "T"), data.draw(some.WIDTHS, "D"), data.draw(st.integers(1, 12), "E")
    constants = data.draw(gatings(T, E), "constants")
    tensors = {
        "x_TD": data.draw(some.exact_numbers(T, D, dtype=data.draw(some.DTYPES))).to(device),
        "gate_ED": data.draw(some.exact_numbers(E, D, dtype=data.draw(some.DTYPES))).to(device),
    }
    if T and data.draw(st.integers(0, 4), "nan") == 4:
        tensors["x_TD"][data.draw(st.integers(0, T - 1))] = torch.nan
    assume(not near_a_rounding_edge(tensors["x_TD"].float() @ tensors["gate_ED"].float().T, constants["probs_dtype"]))
    cotangents = cotangents_of("linear_topk_gating", tensors, data.draw(some.SEEDS), **constants)
    cotangents = {name: cotangents[name] for name in data.draw(outputs_used(), "used")}
    views = data.draw(some.layouts("x_TD", "gate_ED"), "views")
    views_of_gradients = data.draw(some.layouts(*cotangents, of_gradients=True), "views of gradients")
    wrt = data.draw(some.subsets(["x_TD", "gate_ED"]), "wrt")
    with some.running_on(machine, tiles):
        assert_correct(
            "linear_topk_gating",
            laid_out(tensors, views),
            wrt=wrt,
            decide=tensors,
            cotangents=laid_out(cotangents, views_of_gradients),
            rounded_to=constants["probs_dtype"],
            **constants,
        )
