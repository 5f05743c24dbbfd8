# SPDX-License-Identifier: Apache-2.0
"""The layout of tokens in expert-sorted rows: equal, integer by integer, to filling one bucket per expert."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cumo_kernels as ck
from cumo_kernels import tiling
from cumo_kernels.tiling import DispatchTile
from tests import oracles
from tests.cumo_kernels.harness import random_experts
from tests.numerics import assert_bitwise_equal

# On a card a chunk has 1024 choices; with these, a few choices are several chunks, steps and scans.
TILES = [
    pytest.param(None, id="its-own-tile"),
    pytest.param(DispatchTile(CHUNK=8, BLOCK=4, SCAN=4, COUNTED=False), id="several-chunks-reading-all-ids"),
    pytest.param(DispatchTile(CHUNK=8, BLOCK=4, SCAN=2, COUNTED=True), id="several-chunks-with-a-counting-launch"),
]


@pytest.fixture(params=TILES)
def tile(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr(tiling, "dispatch_tile", lambda *_: request.param)


def assert_is_the_plan(expert_TK, num_experts):
    expected = oracles.plan(expert_TK, num_experts)
    for backend in ("triton", "reference"):
        with ck.use_backend(backend):
            plan = ck.plan_dispatch(expert_TK, num_experts)
        plan.validate()
        assert plan.num_experts == num_experts
        assert_bitwise_equal({name: field.cpu() for name, field in plan._asdict().items()}, expected)


@st.composite
def choices(draw):
    """Ids in and out of range, experts named twice by a token, and a number of experts."""
    K, E = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    ids = draw(st.lists(st.integers(-2, E + 2), max_size=60))
    ids = ids[: len(ids) // K * K]
    return torch.tensor(ids, dtype=draw(st.sampled_from([torch.int32, torch.int64]))).view(-1, K), E


@pytest.mark.usefixtures("tile")
@settings(max_examples=60)
@given(choices())
def test_random_choices(device, choices):
    expert_TK, num_experts = choices
    assert_is_the_plan(expert_TK.to(device), num_experts)


@pytest.mark.parametrize("ids", ["strided", "transposed", "expanded"])
def test_ids_may_be_a_view(ids, device):
    expert_TK = random_experts(20, 4, 7, device)
    views = {"strided": expert_TK[::2, ::2], "transposed": expert_TK.T, "expanded": expert_TK[:, :1].expand(20, 3)}
    assert_is_the_plan(views[ids], 5)


# T, K, E
SHAPES = [
    pytest.param(577 * 3, 2, 4, id="three-images-of-577-tokens-are-four-chunks"),
    pytest.param(1024, 1, 8, id="exactly-one-chunk"),
    pytest.param(40, 60, 60, id="every-expert-chosen-by-every-token"),
    pytest.param(9, 2, 256, id="more-experts-than-choices"),
    pytest.param(1100, 1, 1, id="one-expert"),
    pytest.param(2100, 1, 200, id="so-many-that-counting-is-a-launch-of-its-own"),
]


@pytest.mark.parametrize(("T", "K", "E"), SHAPES)
def test_large_choices(T, K, E, device):
    assert_is_the_plan(random_experts(T, K, E, device), E)


@pytest.mark.parametrize("expert", [0, 3, -1, 4, 2**31 - 1, -(2**31)])
def test_all_choices_alike(expert, device):
    assert_is_the_plan(torch.full((40, 2), expert, dtype=torch.int32, device=device), 4)


def test_ids_beyond_32_bits_are_ignored(device):
    expert_TK = torch.tensor([[0, 2**32], [2**32 + 1, 1], [-(2**32), -(2**63)]], device=device)
    assert_is_the_plan(expert_TK, 2)
