# SPDX-License-Identifier: Apache-2.0
"""Upcycled checkpoints compute what the dense ones do, whatever their gates say, until they are trained."""

import pytest
import torch

pytest.importorskip("transformers", reason="whole checkpoints are of models of transformers")

from cumo.checkpoints.files import open_folder
from cumo.checkpoints.upcycle import Upcycling, upcycle_checkpoint, upcycle_config, upcycle_tensors
from cumo.cli import main
from cumo.models.cumo import CuMoForConditionalGeneration
from tests.models.tiny import IMAGE, PATCHES, tiny_config, tiny_model
from tests.numerics import assert_bitwise_equal, relative_error

DENSE = {"vision": {"num_experts": 1, "num_experts_per_tok": 1}, "connector_num_experts": 1}
DENSE["connector_num_experts_per_tok"] = 1
CHOICES = [
    {"vision": 4},
    {"connector": 3},
    {"text": 4},
    {"vision": 2, "connector": 5, "text": 8},
]


@pytest.fixture(scope="module", params=["mistral", "llama"])
def dense(request, tmp_path_factory):
    """Folder of a dense model."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dense") / request.param
    tiny_model(text_type=request.param, **{**DENSE, "vision": dict(DENSE["vision"])}).save_pretrained(folder)
    return folder


def logits_of(folder):
    """Of a fixed batch."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.cat([torch.full((1, PATCHES), IMAGE), torch.randint(3, 50, (1, 5), generator=generator)], dim=1)
    model = CuMoForConditionalGeneration.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=torch.randn(1, 3, 12, 12, generator=generator)).logits


@pytest.mark.parametrize("experts", CHOICES, ids=["vision", "connector", "text", "all"])
def test_each_part_by_itself_and_all_together_change_no_output(dense, experts, tmp_path):
    upcycle_checkpoint(dense, tmp_path / "moe", Upcycling(**experts, top_k=2, seed=3))
    assert relative_error(logits_of(tmp_path / "moe"), logits_of(dense)) <= 1e-5
    model = CuMoForConditionalGeneration.from_pretrained(tmp_path / "moe")
    config = model.config
    assert config.vision_config.num_experts == experts.get("vision", 1)
    assert config.connector_num_experts == experts.get("connector", 1)
    assert getattr(config.text_config, "num_local_experts", 1) == experts.get("text", 1)


def stream(**options):
    """Upcycled tensors of a tiny dense model."""
    torch.manual_seed(0)
    model = tiny_model(text_type="mistral", **{**DENSE, "vision": dict(DENSE["vision"])})
    return dict(upcycle_tensors(model.state_dict().items(), Upcycling(vision=4, connector=4, **options)))


def test_gates_depend_on_the_seed_alone():
    first, again, other = stream(seed=1), stream(seed=1), stream(seed=2)
    assert_bitwise_equal(first, again)
    differing = {name for name in first if not torch.equal(first[name], other[name])}
    assert differing == {name for name in first if name.endswith("gate.weight")}
    gates = [first[name] for name in sorted(differing) if first[name].shape == (4, 32)]
    assert all(not torch.equal(a, b) for i, a in enumerate(gates) for b in gates[:i]), "layers share a gate"
    bound = 32**-0.5
    assert all(0.8 * bound < gate.abs().max() <= bound for gate in gates), "not as nn.Linear draws its weight"


def test_noise_tells_the_experts_apart_by_its_share_of_their_spread():
    plain, noisy = stream(seed=1), stream(seed=1, noise=0.1)
    for name in plain:
        if not name.endswith(("up_proj", "down_proj")) or "language" in name:
            continue
        difference = noisy[name] - plain[name]
        assert abs(difference.std() / plain[name].std() - 0.1) < 0.02, name
        assert not torch.equal(noisy[name][0], noisy[name][1])


def test_the_command(dense, tmp_path, capsys):
    target = tmp_path / "moe"
    assert main(["upcycle", str(dense), str(target), "--vision", "4", "--connector", "4", "--seed", "7"]) == 0
    assert "written with experts {'vision': 4, 'connector': 4}" in capsys.readouterr().out
    upcycle_checkpoint(dense, tmp_path / "same", Upcycling(vision=4, connector=4, seed=7))
    assert_bitwise_equal(dict(open_folder(target)), dict(open_folder(tmp_path / "same")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "experts: expected a number for vision, connector or text, got none"),
        ({"vision": 1}, "vision: expected two experts or more, got 1"),
        ({"vision": 4, "top_k": 5}, "top_k"),
        ({"text": 4, "noise": -0.1}, "noise: expected a finite number >= 0, got -0.1"),
        ({"text": 4, "noise": float("nan")}, "noise"),
    ],
)
def test_numbers_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        Upcycling(**options)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({}, {"vision": 4}, "vision: expected a dense one, got 4 experts; to continue from them, train without upcy"),
        ({}, {"connector": 4}, "connector: expected a dense one, got 4 experts"),
        ({"text_type": "mixtral"}, {"text": 4}, "text: expected a dense one, got 4 experts"),
        (
            {"connector_num_experts": 1, "connector_num_experts_per_tok": 1, "connector_type": "linear"},
            {"connector": 4},
            "connector: expected connector_type mlp2x_gelu, got 'linear'",
        ),
        ({"text_type": "gpt2", "text": {"n_head": 4}}, {"text": 4}, "text: expected one of"),
        ({"text_type": "llama", "text": {"mlp_bias": True}}, {"text": 4}, "without biases"),
    ],
    ids=["vision", "connector", "text", "linear", "family", "bias"],
)
def test_models_of_which_no_experts_can_be_made(config, options, message):
    with pytest.raises(ValueError, match=message):
        upcycle_config(tiny_config(**config), Upcycling(**options))


def test_an_mlp_with_a_tensor_missing_or_unknown():
    tensors = {f"vision_tower.layers.0.mlp.{name}": torch.zeros(2, 2) for name in ("fc1.weight", "fc2.weight")}
    with pytest.raises(ValueError, match=r"expected all of each dense MLP, got only .*fc1\.weight"):
        list(upcycle_tensors(tensors.items(), Upcycling(vision=2)))
    with pytest.raises(ValueError, match=r"fc3\.weight: expected one of"):
        list(upcycle_tensors([("vision_tower.layers.0.mlp.fc3.weight", torch.zeros(1))], Upcycling(vision=2)))


def test_upcycling_twice_leaves_no_target(dense, tmp_path):
    upcycle_checkpoint(dense, tmp_path / "moe", Upcycling(vision=2))
    with pytest.raises(ValueError, match="vision: expected a dense one, got 2 experts"):
        upcycle_checkpoint(tmp_path / "moe", tmp_path / "again", Upcycling(vision=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moe"]
