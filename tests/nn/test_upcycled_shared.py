# SPDX-License-Identifier: Apache-2.0
"""MLPs that are more than one module of their own: shared ones, and what hangs on them and would be lost."""

import pytest
import torch
from torch import nn

from cumo.nn import upcycle
from tests.numerics import assert_bitwise_equal, relative_error


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


@pytest.fixture
def shared():
    """One MLP under two names, as in ALBERT."""
    one = mlp()
    return nn.Sequential(one, nn.LayerNorm(8), one)


@pytest.mark.parametrize("pattern", ["0|2", "2"], ids=["both names", "one of its names"])
def test_a_shared_mlp_becomes_one_shared_mixture(shared, pattern):
    dense, x = shared[0], torch.randn(2, 3, 8)
    expected, before = shared(x), dict(shared.state_dict())
    upcycled = upcycle(shared, pattern, num_experts=4, top_k=2)
    assert shared[0] is shared[2] and list(upcycled.modules) == ["0"]
    assert relative_error(shared(x), expected) <= 1e-5
    state = shared.state_dict()
    assert state["0.moe.up_proj"].data_ptr() == state["2.moe.up_proj"].data_ptr()
    with upcycled.routings() as routings:
        shared(x)
    assert list(routings) == ["0"]
    upcycled.losses(routings).balance.backward()
    other = nn.Sequential(mlp(), nn.LayerNorm(8))
    other.append(other[0])
    upcycle(other, pattern, num_experts=4, top_k=2)
    other.load_state_dict(state)
    assert torch.equal(other(x), shared(x))
    upcycled.undo()
    assert shared[0] is dense and shared[2] is dense
    assert_bitwise_equal(dict(shared.state_dict()), before)


def test_a_shared_block_around_the_mlp():
    block = nn.Sequential(mlp())
    model = nn.ModuleDict({"a": block, "b": block})
    upcycled = upcycle(model, r"[ab]\.0", num_experts=2, top_k=1)
    assert model["a"][0] is model["b"][0] and list(upcycled.modules) == ["a.0"]
    upcycled.undo()
    assert isinstance(model["b"][0], nn.Sequential)


HOOKS = {
    "forward": lambda module: module.register_forward_hook(lambda *_: None),
    "forward pre": lambda module: module.register_forward_pre_hook(lambda *_: None),
    "backward": lambda module: module.register_full_backward_hook(lambda *_: None),
    "a replaced forward": lambda module: setattr(module, "forward", module.forward),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("place", ["itself", "a layer of it"])
def test_hooks_are_not_dropped(kind, place):
    model = nn.ModuleDict({"a": mlp(), "b": mlp()})
    HOOKS[kind](model["b"] if place == "itself" else model["b"][0])
    with pytest.raises(ValueError, match=f"b: expected an MLP without hooks, which would be lost, got .*{kind}"):
        upcycle(model, "a|b", num_experts=2, top_k=1)
    assert isinstance(model["a"], nn.Sequential), "nothing is changed"


def test_tied_parameters_are_not_untied():
    model = nn.ModuleDict({"a": mlp(), "b": mlp()})
    model["b"][0].weight = model["a"][0].weight
    with pytest.raises(ValueError, match=r"a: expected an MLP with parameters of its own, got one that is b\.0"):
        upcycle(model, "a|b", num_experts=2, top_k=1)


def test_losses_of_inputs_of_different_kinds():
    model = nn.ModuleDict({"a": mlp(), "b": mlp()})
    upcycled = upcycle(model, "a|b", num_experts=2, top_k=1)
    with upcycled.routings() as routings:
        model["a"](torch.randn(2, 3, 8))
        model["b"](torch.randn(5, 8))
    with pytest.raises(ValueError, match=r"routings: expected equally many segments .* got \{'a': 2, 'b': 1\}"):
        upcycled.losses(routings)
    assert upcycled.losses({"a": routings["a"]}).balance > 0
