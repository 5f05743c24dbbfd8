# SPDX-License-Identifier: Apache-2.0
"""The published layout of experts to stacked parameters and back, bit by bit, or an error that says what is wrong."""

import pytest
import torch

from cumo.checkpoints.layout import (
    STYLES,
    published_styles,
    stack_experts,
    stack_state_dict,
    stacked_styles,
    unstack_experts,
    unstack_state_dict,
)
from cumo.nn import MoEMLP
from tests.numerics import assert_bitwise_equal

E, D, F, O = 3, 5, 7, 4
LAYOUTS = {
    "connector": {"0.weight": (F, D), "0.bias": (F,), "2.weight": (O, F), "2.bias": (O,)},
    "clip": {"fc1.weight": (F, D), "fc1.bias": (F,), "fc2.weight": (O, F), "fc2.bias": (O,)},
    "mixtral": {"w1.weight": (F, D), "w3.weight": (F, D), "w2.weight": (O, F)},
}


def published(style, dtype=torch.float32, prefix=""):
    """Random tensors of one MLP as it is published, NaN and negative zero among them."""
    tensors = {"gate.weight": torch.randn(E, D).to(dtype)}
    for i in range(E):
        for name, shape in LAYOUTS[style].items():
            tensors[f"experts.{i}.{name}"] = torch.randn(shape).to(dtype)
    last = tensors[f"experts.{E - 1}.{name}"]
    last.view(-1)[:2] = torch.tensor([torch.nan, -0.0])
    return {prefix + key: tensor for key, tensor in tensors.items()}


def bits(tensors):
    """The tensors as integers: NaN and signed zeros count."""
    return {key: tensor.view({4: torch.int32, 2: torch.int16}[tensor.itemsize]) for key, tensor in tensors.items()}


def checkpoint():
    """A whole checkpoint with an MLP of each style."""
    return {
        "model.embed_tokens.weight": torch.randn(2, 3),
        **published("clip", prefix="model.vision_tower.vision_model.encoder.layers.0."),
        **published("clip", prefix="model.vision_tower.vision_model.encoder.layers.11."),
        **published("connector", prefix="model.mm_projector."),
        **published("mixtral", torch.bfloat16, prefix="model.layers.0.block_sparse_moe."),
        "model.layers.1.mlp.up_proj.weight": torch.randn(2, 3),
        "model.layers.1.mlp.gate_proj.weight": torch.randn(2, 3),
        "model.investigate.weight": torch.randn(2),
    }


STYLE_OF_PREFIX = {
    "model.vision_tower.vision_model.encoder.layers.0.": "clip",
    "model.vision_tower.vision_model.encoder.layers.11.": "clip",
    "model.mm_projector.": "connector",
    "model.layers.0.block_sparse_moe.": "mixtral",
}


def test_every_style_is_tested():
    assert LAYOUTS.keys() == STYLES.keys()


@pytest.mark.parametrize("style", LAYOUTS)
def test_experts_stand_where_the_module_wants_them(style):
    tensors = published(style)
    stacked = stack_experts(tensors, style)
    MoEMLP(D, F, O, num_experts=E, top_k=1, gated=style == "mixtral", bias=style != "mixtral").load_state_dict(stacked)
    first, second, *_ = LAYOUTS[style]
    for i in range(E):
        expected = tensors[f"experts.{i}.{first}"]
        if style == "mixtral":  # w1 is the gate, whose rows come first
            expected = torch.cat([expected, tensors[f"experts.{i}.{second}"]])
        assert torch.equal(stacked["up_proj"][i], expected)
    last = {"connector": "2.weight", "clip": "fc2.weight", "mixtral": "w2.weight"}[style]
    down = torch.stack([tensors[f"experts.{i}.{last}"] for i in range(E)])
    assert_bitwise_equal({"down_proj": stacked["down_proj"]}, {"down_proj": down})
    assert torch.equal(stacked["gate.weight"], tensors["gate.weight"])


@pytest.mark.parametrize("style", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_of_one_mlp(style, dtype):
    tensors = published(style, dtype)
    assert_bitwise_equal(bits(unstack_experts(stack_experts(tensors, style), style)), bits(tensors))


@pytest.mark.parametrize("convert", [stack_experts, unstack_experts])
@pytest.mark.parametrize("style", LAYOUTS)
def test_no_memory_is_shared_and_nothing_changed(style, convert):
    tensors = published(style)
    if convert is unstack_experts:
        tensors = stack_experts(tensors, style)
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    converted = convert(tensors, style)
    storages = {tensor.untyped_storage().data_ptr() for tensor in converted.values()}
    assert len(storages) == len(converted), "tensors of one storage cannot be saved as safetensors"
    assert all(tensor.is_contiguous() for tensor in converted.values())
    for tensor in converted.values():
        tensor.fill_(7)
    assert_bitwise_equal(bits(tensors), bits(before))


def test_one_expert():
    tensors = {
        key: tensor for key, tensor in published("clip").items() if not key.startswith(("experts.1", "experts.2"))
    }
    tensors["gate.weight"] = tensors["gate.weight"][:1]
    assert stack_experts(tensors, "clip")["up_proj"].shape == (1, F, D)


def test_more_than_ten_experts_keep_their_order():
    tensors = {"gate.weight": torch.zeros(12, D)}
    for i in reversed(range(12)):
        for name, shape in LAYOUTS["clip"].items():
            tensors[f"experts.{i}.{name}"] = torch.full(shape, float(i))
    assert stack_experts(tensors, "clip")["up_proj_bias"][:, 0].tolist() == list(range(12))


def without(key):
    return lambda tensors: tensors.pop(key)


def put(key, *shape, dtype=torch.float32):
    return lambda tensors: tensors.update({key: torch.zeros(shape, dtype=dtype)})


STACK_FAULTS = {
    "tensor missing": (without("experts.1.fc2.bias"), r"missing experts\.1\.fc2\.bias$"),
    "last expert missing": (
        lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith("experts.2.")],
        r"missing experts\.2\.fc1\.bias, experts\.2\.fc1\.weight, experts\.2\.fc2\.bias, experts\.2\.fc2\.weight$",
    ),
    "numbered from one": (
        lambda tensors: [
            tensors.update({key.replace(".0.", ".3."): tensors.pop(key)}) for key in list(tensors) if ".0." in key
        ],
        r"missing experts\.0\..*; unexpected experts\.3\.",
    ),
    "one expert too many": (put("experts.3.fc1.bias", F), r"expected 3 experts .*; unexpected experts\.3\.fc1\.bias$"),
    "unknown tensor": (put("experts.0.fc3.bias", F), r"unexpected experts\.0\.fc3\.bias$"),
    "leading zero": (put("experts.01.fc1.bias", F), r"unexpected experts\.01\.fc1\.bias$"),
    "something else": (put("norm.weight", F), r"unexpected norm\.weight$"),
    "no gate": (without("gate.weight"), r"expected gate\.weight among them"),
    "gate of one dimension": (put("gate.weight", D), r"gate\.weight: expected shape \[E D\], got \[5\]"),
    "gate of another width": (put("gate.weight", E, D + 1), r"experts\.0\.fc1\.weight: expected .* D=6 as in gate"),
    "two shapes": (
        lambda tensors: (put("experts.1.fc1.bias", F + 1)(tensors), put("experts.2.fc2.bias", 1)(tensors)),
        r"experts\.1\.fc1\.bias: expected torch\.float32 \[7\] as expert 0, got torch\.float32 \[8\]; experts\.2",
    ),
    "two dtypes": (
        put("experts.1.fc1.bias", F, dtype=torch.bfloat16),
        r"experts\.1\.fc1\.bias: expected torch\.float32 \[7\] as expert 0, got torch\.bfloat16 \[7\]",
    ),
    "layers that do not fit": (
        lambda tensors: [put(f"experts.{i}.fc2.weight", O, F + 1)(tensors) for i in range(E)],
        r"experts\.0\.fc2\.weight: expected shape \[O F\] with F=7",
    ),
}

UNSTACK_FAULTS = {
    "parameter missing": (without("down_proj"), r"missing down_proj$"),
    "biases, which mixtral has not": (put("up_proj_bias", E, 2 * F), r"unexpected up_proj_bias$"),
    "no gate": (without("gate.weight"), r"missing gate\.weight$"),
    "odd rows": (
        put("up_proj", E, 2 * F + 1, D),
        r"up_proj: expected .* rows of w1\.weight and w3\.weight, got \[3, 15",
    ),
    "not stacked": (put("down_proj", O), r"down_proj: expected shape \[E O F\]"),
    "another number of experts": (put("down_proj", E + 1, O, F), r"down_proj .*: expected .* E=3 as in gate\.weight"),
    "not gated": (put("up_proj", E, 2 * F - 2, D), r"F=6 as in up_proj \(rows of w1\.weight\)"),
}


@pytest.mark.parametrize("name", STACK_FAULTS)
def test_faults_of_published_tensors_are_listed(name):
    plant, message = STACK_FAULTS[name]
    tensors = published("clip")
    plant(tensors)
    with pytest.raises(ValueError, match=message):
        stack_experts(tensors, "clip")
    in_a_checkpoint = {f"encoder.layers.0.{key}": tensor for key, tensor in tensors.items()}
    if name not in ("unknown tensor", "something else"):  # the one is found earlier, the other is no concern of the MLP
        with pytest.raises(ValueError, match=rf"^encoder\.layers\.0\.: .*{message}"):
            stack_state_dict(in_a_checkpoint)


@pytest.mark.parametrize("name", UNSTACK_FAULTS)
def test_faults_of_stacked_parameters_are_listed(name):
    plant, message = UNSTACK_FAULTS[name]
    tensors = stack_experts(published("mixtral"), "mixtral")
    plant(tensors)
    with pytest.raises(ValueError, match=message):
        unstack_experts(tensors, "mixtral")
    with pytest.raises(ValueError, match=rf"^a\.block_sparse_moe\.: .*{message}"):
        unstack_state_dict({f"a.block_sparse_moe.{key}": tensor for key, tensor in tensors.items()})


@pytest.mark.parametrize("convert", [stack_experts, unstack_experts])
def test_unknown_style(convert):
    with pytest.raises(ValueError, match=r"style: expected one of \['connector', 'clip', 'mixtral'\], got 'llama'"):
        convert({}, "llama")


def test_a_checkpoint_tells_its_styles():
    state = checkpoint()
    assert published_styles(state) == STYLE_OF_PREFIX
    assert stacked_styles(stack_state_dict(state)) == STYLE_OF_PREFIX
    assert published_styles(stack_state_dict(state)) == stacked_styles(state) == {}


@pytest.mark.parametrize("styles", [None, STYLE_OF_PREFIX], ids=["by module", "given"])
def test_round_trip_of_a_checkpoint(styles):
    state = checkpoint()
    before = dict(state)
    stacked = stack_state_dict(state)
    back = unstack_state_dict(stacked, styles)
    assert state == before, "the dictionary given was changed"
    assert_bitwise_equal(bits(back), bits(state))
    others = [key for key in state if "experts." not in key and ".gate.weight" not in key]
    assert len(others) == 4
    for key in others:
        assert stacked[key] is back[key] is state[key]
    assert not [key for key in stacked if "experts" in key]
    assert stacked["model.layers.0.block_sparse_moe.up_proj"].shape == (E, 2 * F, D)


def test_a_bare_mlp_has_the_empty_prefix():
    tensors = published("connector")
    assert published_styles(tensors) == {"": "connector"}
    assert_bitwise_equal(bits(unstack_state_dict(stack_state_dict(tensors), {"": "connector"})), bits(tensors))


def test_only_the_given_prefixes_are_converted():
    stacked = stack_state_dict(checkpoint())
    back = unstack_state_dict(stacked, {"model.mm_projector.": "connector"})
    assert published_styles(back) == {"model.mm_projector.": "connector"}
    assert stacked.keys() - back.keys() == {
        f"model.mm_projector.{name}" for name in ("up_proj", "up_proj_bias", "down_proj", "down_proj_bias")
    }


def test_a_module_whose_name_tells_no_style():
    with pytest.raises(ValueError, match=r"styles: none given for 'model\.other\.', and its name is none of"):
        unstack_state_dict({"model.other.up_proj": torch.zeros(1)})


@pytest.mark.parametrize("names", [["fc9.weight"], ["fc1.weight", "w1.weight"]], ids=["unknown", "of two styles"])
def test_experts_of_no_style(names):
    with pytest.raises(ValueError, match=rf"^a\.experts: expected names of one style .*, got \['{names[0]}'"):
        stack_state_dict({f"a.experts.0.{name}": torch.zeros(1) for name in names})
