# SPDX-License-Identifier: Apache-2.0
"""What trains, with which learning rate, and in which dtype."""

import pytest
import torch

from cumo.train.modules import clean, freeze, groups_of, home_of, part_of, set_dtypes, summary
from cumo.train.recipe import Train
from tests.models.tiny import tiny_model


@pytest.fixture
def model():
    return tiny_model(text_type="mixtral")


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_parts(model):
    parts = {name: part_of(name) for name, _ in model.named_parameters()}
    assert set(parts.values()) == {"vision", "connector", "text", "routers"}
    routers = {name for name, part in parts.items() if part == "routers"}
    assert routers == {name for name in parts if name.endswith("gate.weight")} and len(routers) == 3 + 1 + 2
    assert part_of("language_model.model.layers.0.mlp.gate_proj.weight") == "text"
    assert home_of("connector.projection.gate.weight") == "connector"
    with pytest.raises(ValueError, match="other.weight: expected the name of a parameter in"):
        home_of("other.weight")
    assert clean("module._orig_mod.a._checkpoint_wrapped_module.modules.up") == "a.modules.up"


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        (Train(), {"vision", "connector", "text", "routers"}),
        (Train(vision=False, text=False), {"connector", "routers"}),
        (Train(routers=False), {"vision", "connector", "text"}),
        (Train(vision=False, connector=False, text=False, routers=1e-4), {"routers"}),
    ],
)
def test_freezing(model, train, expected):
    freeze(model, train)
    assert {part_of(name) for name in trained(model)} == expected
    unused = {name for name, _ in model.named_parameters() if name.startswith("vision_tower.layers.2.")}
    assert not trained(model) & unused, "what the features do not depend on gets no gradient"
    assert {part for part, _, trains in summary(model) if trains} == expected


def test_routers_follow_the_part_that_they_are_in(model):
    freeze(model, Train(vision=False, text=False))
    assert "connector.projection.gate.weight" in trained(model)
    assert "vision_tower.layers.0.mlp.gate.weight" not in trained(model)


def test_groups(model):
    train = Train(vision=1e-5, connector=True, text=2e-5, routers=3e-5)
    freeze(model, train)
    named = dict(model.named_parameters())
    decayed = [name for name in named if name.endswith("weight") and "norm" not in name]
    groups = groups_of(named.items(), train, 1e-3, 0.1, decayed)
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates == {"vision": 1e-5, "connector": 1e-3, "text": 2e-5, "routers": 3e-5}
    parameters = [parameter for group in groups for parameter in group["params"]]
    assert {id(p) for p in parameters} == {id(p) for p in named.values() if p.requires_grad}
    assert len(parameters) == len({id(p) for p in parameters})
    ids = {id(named[name]) for name in decayed}
    for group in groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.1 if id(parameter) in ids else 0.0)


def test_dtypes(model):
    model = model.to(torch.bfloat16)
    freeze(model, Train(text=False))
    set_dtypes(model, torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
