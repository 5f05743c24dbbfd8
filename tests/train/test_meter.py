# SPDX-License-Identifier: Apache-2.0
"""Loads and entropies of the log, counted again by hand."""

import math

import pytest
import torch

from cumo.train.losses import contributions, count
from cumo.train.meter import Meter, flat
from tests.models.tiny import IMAGE, PATCHES, tiny_model


@pytest.fixture
def model():
    return tiny_model(text_type="mixtral")


def batch(images=2):
    text = torch.randint(3, 50, (2, 6))
    if not images:
        return {"input_ids": text, "labels": text}
    ids = torch.cat([torch.full((2, PATCHES), IMAGE), text], dim=1)
    return {"input_ids": ids, "labels": ids.masked_fill(ids == IMAGE, -100), "pixel_values": torch.randn(2, 3, 12, 12)}


def meter_of(model, *batches):
    """Each batch a step of its own."""
    meter, outputs = Meter(model.config, torch.device("cpu")), []
    for inputs in batches:
        with torch.no_grad():
            output = model(**inputs)
        counts = count(inputs)
        meter.add(contributions(output, counts, counts), output, counts)
        meter.add_step(counts)
        outputs.append(output)
    return meter, outputs


def shares(experts, number):
    """Of each expert in a list of choices."""
    chosen = experts.flatten().tolist()
    return [chosen.count(expert) / len(chosen) for expert in range(number)]


def test_loads_by_layer_and_scale(model):
    meter, outputs = meter_of(model, batch(), batch())
    record = meter.report(1)
    segment = PATCHES + 1  # with the class token
    for layer in (0, 1):
        experts = [output.vision_routings[layer].expert_TK for output in outputs]
        for scale, rows in (("1", slice(0, 2 * segment)), ("2", slice(2 * segment, None))):
            expected = shares(torch.cat([choices[rows] for choices in experts]), 4)
            assert record["expert_load"]["vision"][str(layer)][scale] == pytest.approx(expected)
        text = torch.cat([output.text_routings[layer].expert_TK for output in outputs])
        assert record["expert_load"]["text"][str(layer)] == pytest.approx(shares(text, 4))
    connector = torch.cat([output.connector_routing.expert_TK for output in outputs])
    assert record["expert_load"]["connector"] == pytest.approx(shares(connector, 4))


def test_entropies(model):
    meter, (output,) = meter_of(model, batch())
    record = meter.report(1)
    routing = output.connector_routing
    mean = routing.mean_probs_SE.mean(dim=0).double()
    expected = -(mean * mean.log()).sum() / math.log(4)
    assert record["router_entropy"]["connector"] == pytest.approx(float(expected))
    weights = routing.weight_TK.double()
    expected = -(weights * weights.log()).sum(dim=1).mean() / math.log(2)
    assert record["choice_entropy"]["connector"] == pytest.approx(float(expected))


def test_means_over_steps_and_over_those_with_pictures(model):
    meter, outputs = meter_of(model, batch(), batch(images=0), batch())
    record = meter.report(1)
    with_pictures = [outputs[0], outputs[2]]
    assert record["lm_loss"] == pytest.approx(sum(float(output.lm_loss) for output in outputs) / 3)
    assert record["loss"] == pytest.approx(sum(float(output.loss) for output in outputs) / 3)
    expected = sum(float(output.vision_losses.balance) for output in with_pictures) / 2
    assert record["vision_balance"] == pytest.approx(expected)
    assert (record["images"], record["tokens"]) == (4, 2 * 6 * 3 + 4 * PATCHES)


def test_a_window_without_pictures(model):
    meter, _ = meter_of(model, batch(images=0))
    record = meter.report(1)
    assert set(record["expert_load"]) == {"text"} and not any(name.startswith("vision") for name in record)
    meter, _ = meter_of(model, batch())
    meter.report(1)
    assert meter.report(1)["expert_load"] == {}, "a report begins anew"


@pytest.mark.parametrize(("family", "sparse"), [("qwen2_moe", 2), ("ernie4_5_moe", 1)])
def test_language_models_with_other_names_for_their_experts(family, sparse):
    names = ("moe_num_experts", "moe_k") if family == "ernie4_5_moe" else ("num_experts", "num_experts_per_tok")
    text = {**dict(zip(names, (3, 2), strict=True)), "moe_intermediate_size": 16}
    model = tiny_model(text_type=family, text={**text, "shared_expert_intermediate_size": 16})
    meter, (output,) = meter_of(model, batch())
    record = meter.report(1)
    assert len(output.text_routings) == sparse, "the other layer of Ernie is dense"
    loads = {str(i): shares(routing.expert_TK, 3) for i, routing in enumerate(output.text_routings)}
    assert record["expert_load"]["text"] == {layer: pytest.approx(load) for layer, load in loads.items()}
    assert record["loss"] == pytest.approx(float(output.loss))


def test_saved_and_loaded(model):
    torch.manual_seed(1)
    whole, _ = meter_of(model, batch(), batch())
    torch.manual_seed(1)
    first, _ = meter_of(model, batch())
    second, _ = meter_of(model, batch())
    second.sums = {name: value + first.state_dict()[name] for name, value in second.sums.items()}
    third = Meter(model.config, torch.device("cpu"))
    third.load_state_dict(second.state_dict())
    assert third.report(1) == whole.report(1)


def test_flat():
    record = {"step": 3, "lr": {"vision": 0.1}, "expert_load": {"connector": [0.2, 0.8]}, "grad_norm": None}
    assert flat(record) == {
        "step": 3.0,
        "lr/vision": 0.1,
        "expert_load/connector/least": 0.2,
        "expert_load/connector/most": 0.8,
    }
