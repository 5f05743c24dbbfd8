# SPDX-License-Identifier: Apache-2.0
"""Whole models upcycled: other people's classes, the same output, losses on request, saved, loaded, undone."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cumo.nn import MoEMLP, upcycle
from cumo.nn.losses import routing_losses
from tests.numerics import assert_bitwise_equal, relative_error


class Block(nn.Module):
    """Of a small transformer without attention."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.mlp = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))
        self.reentrant = None

    def forward(self, x):
        if self.reentrant is None:
            return x + self.mlp(self.norm(x))
        return x + checkpoint(self.mlp, self.norm(x), use_reentrant=self.reentrant)


class Model(nn.Module):
    """Two blocks and a head."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


PATTERN = r"blocks\.\d+\.mlp"


@pytest.fixture
def x():
    return torch.randn(2, 7, 12, requires_grad=True)


def test_the_output_stays_and_only_what_matches_is_replaced(x):
    model = Model()
    expected = model(x)
    upcycled = upcycle(model, PATTERN, num_experts=4, top_k=2)
    assert relative_error(model(x), expected) <= 1e-5
    assert list(upcycled.modules) == ["blocks.0.mlp", "blocks.1.mlp"]
    assert all(isinstance(moe, MoEMLP) and moe.num_experts == 4 for moe in upcycled.modules.values())
    assert type(model.head) is nn.Linear


def test_losses_are_those_of_the_collected_routings(x):
    model = Model()
    upcycled = upcycle(model, PATTERN, num_experts=3, top_k=2)
    with upcycled.routings() as routings:
        model(x)
    assert list(routings) == ["blocks.0.mlp", "blocks.1.mlp"]
    losses = upcycled.losses(routings, "cumo")
    expected = routing_losses(list(routings.values()), [2], "cumo")
    assert torch.equal(losses.balance, expected.balance) and torch.equal(losses.z, expected.z)
    losses.z.backward()
    assert all(moe.gate.weight.grad.norm() > 0 for moe in upcycled.modules.values())


def test_nothing_is_collected_outside_of_the_block(x):
    model = Model()
    upcycled = upcycle(model, PATTERN, num_experts=3, top_k=2)
    with pytest.raises(RuntimeError, match="stop"), upcycled.routings() as routings:
        model(x)
        raise RuntimeError("stop")
    first = dict(routings)
    model(x)
    assert all(routings[name] is first[name] for name in first)
    with upcycled.routings(), pytest.raises(ValueError, match="expected no block within another"), upcycled.routings():
        pass


def test_the_last_call_counts(x):
    model = Model()
    upcycled = upcycle(model, PATTERN, num_experts=3, top_k=2)
    with upcycled.routings() as routings:
        model(x)
        model(x[:, :4])
    assert all(routing.expert_TK.shape == (2 * 4, 2) for routing in routings.values())


def test_checkpointing_keeps_the_losses_or_says_that_it_cannot(x):
    plain, other = Model(), None
    upcycled = upcycle(plain, PATTERN, num_experts=3, top_k=2, generator=torch.Generator().manual_seed(0))
    with upcycled.routings() as routings:
        plain(x)
    expected = torch.autograd.grad(upcycled.losses(routings).z, x)[0]
    for reentrant in (False, True):
        other = copy.deepcopy(plain)
        for block in other.blocks:
            block.reentrant = reentrant
        again = type(upcycled)(other, upcycled._dense)
        with again.routings() as routings:
            other(x)
        if reentrant:
            with pytest.raises(ValueError, match="use_reentrant=False keeps it"):
                again.losses(routings)
        else:
            assert relative_error(torch.autograd.grad(again.losses(routings).z, x)[0], expected) <= 1e-6


def test_saved_and_loaded_into_a_model_upcycled_alike(x):
    model, other = Model(), Model()
    for each in (model, other):
        upcycle(each, PATTERN, num_experts=3, top_k=2)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(x), model(x))
    assert "blocks.0.mlp.moe.gate.weight" in model.state_dict()


def test_undone_the_model_is_what_it_was(x):
    model = Model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    upcycled = upcycle(model, PATTERN, num_experts=3, top_k=2)
    with torch.no_grad():
        for moe in upcycled.modules.values():
            moe.up_proj.zero_()
    upcycled.undo()
    assert_bitwise_equal(dict(model.state_dict()), before)
    assert model(x).shape == (2, 7, 3)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"layers\.\d+", "pattern: expected to match the name of a module"),
        (r"blocks\.1(\.norm)?", "blocks.1: mlp: exp"),
    ],
    ids=["nothing", "no MLP"],
)
def test_patterns_that_do_not_fit_change_nothing(pattern, message):
    model = Model()
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        upcycle(model, pattern, num_experts=3, top_k=2)
    assert list(model.state_dict()) == names


def test_a_mixture_that_was_replaced_is_named():
    model = Model()
    upcycled = upcycle(model, PATTERN, num_experts=3, top_k=2)
    model.blocks[1].mlp = nn.Identity()
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp: expected an UpcycledMLP, got Identity"):
        upcycled.undo()
    assert "blocks.0.mlp.moe.up_proj" in model.state_dict()


def clip():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=8, patch_size=4)), {"pixel_values": (2, 3, 8, 8)}


def siglip():
    from transformers import SiglipVisionConfig, SiglipVisionModel

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=8, patch_size=4)), {"pixel_values": (2, 3, 8, 8)}


def decoder(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(family, **sizes, num_key_value_heads=2, vocab_size=30, pad_token_id=0)
    return AutoModelForCausalLM.from_config(config), {"input_ids": (2, 5)}


MODELS = {"clip": clip, "siglip": siglip, "llama": lambda: decoder("llama"), "mistral": lambda: decoder("mistral")}


@pytest.mark.parametrize("family", MODELS)
def test_models_of_transformers(family):
    pytest.importorskip("transformers", reason="their classes are those of transformers")
    model, shapes = MODELS[family]()
    model.eval()
    ((name, shape),) = shapes.items()
    inputs = torch.randint(1, 30, shape) if name == "input_ids" else torch.randn(shape)
    expected = model(**{name: inputs})[0]
    upcycled = upcycle(model, r".*layers\.\d+\.mlp", num_experts=4, top_k=2)
    assert len(upcycled.modules) == 2
    with upcycled.routings() as routings:
        output = model(**{name: inputs})[0]
    assert relative_error(output, expected) <= 1e-5
    assert upcycled.losses(routings).balance > 0
