# SPDX-License-Identifier: Apache-2.0
"""The vision encoder by itself, out of a whole model of either layout or of its own folder."""

import logging
import re
import shutil

import pytest
import torch

pytest.importorskip("transformers", reason="the vision encoder is built on transformers")

from safetensors.torch import load_file, save_file
from transformers import AutoModel

from cumo import CuMoForConditionalGeneration, CuMoVisionConfig, CuMoVisionModel
from tests.numerics import assert_bitwise_equal

WEIGHTS = "model.safetensors"


@pytest.fixture(params=["native", "published"])
def folder(request, native, published):
    """Of a whole model."""
    return {"native": native, "published": published}[request.param]


@pytest.fixture
def whole(native):
    """The same model."""
    return CuMoForConditionalGeneration.from_pretrained(native)


def test_the_encoder_of_a_whole_model(folder, whole, caplog):
    with caplog.at_level(logging.WARNING, logger="transformers"):
        encoder = CuMoVisionModel.from_pretrained(folder)
    assert caplog.text == "", "nothing is missing, and that the rest is left is no news"
    assert type(encoder.config) is CuMoVisionConfig and type(encoder) is CuMoVisionModel
    assert_bitwise_equal(dict(encoder.state_dict()), dict(whole.vision_tower.state_dict()))
    pixels = torch.randn(2, 3, 12, 12)
    assert torch.equal(encoder(pixels).features, whole.vision_tower(pixels).features)


def test_with_its_configuration_at_hand_and_in_another_dtype(folder, whole):
    encoder = CuMoVisionModel.from_pretrained(folder, config=whole.config.vision_config, dtype=torch.bfloat16)
    expected = {name: tensor.bfloat16() for name, tensor in whole.vision_tower.state_dict().items()}
    expected["embeddings.position_ids"] = encoder.embeddings.position_ids
    state = dict(encoder.state_dict())
    assert_bitwise_equal({name: state[name] for name in expected if name in state}, {
        name: expected[name] for name in expected if name in state
    })  # fmt: skip


def test_the_configuration_of_the_encoder(folder, whole):
    config = CuMoVisionConfig.from_pretrained(folder)
    assert config.scales == whole.config.vision_config.scales
    assert config.encoder_config.to_dict() == whole.config.vision_config.encoder_config.to_dict()
    assert CuMoVisionConfig.from_pretrained(folder, keep_unused_layers=True).keep_unused_layers


def test_saved_it_is_an_encoder_of_its_own(folder, tmp_path):
    encoder = CuMoVisionModel.from_pretrained(folder)
    encoder.save_pretrained(tmp_path)
    for model_class in (CuMoVisionModel, AutoModel):
        again = model_class.from_pretrained(tmp_path)
        assert_bitwise_equal(dict(again.state_dict()), dict(encoder.state_dict()))


@pytest.mark.parametrize(("kind", "told"), [("layer_norm1", "missing"), ("up_proj|fc1", "missing|of another shape")])
def test_missing_tensors_are_named(folder, kind, told, tmp_path):
    """Also one of an expert, in the layout where experts lie apart."""
    target = tmp_path / "spoilt"
    shutil.copytree(folder, target)
    tensors = load_file(target / WEIGHTS)
    tensors.pop(next(name for name in tensors if "vision_tower" in name and re.search(kind, name)))
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"expected the tensors of its configuration .*({told})"):
        CuMoVisionModel.from_pretrained(target)


def test_a_folder_of_something_else(tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=8, patch_size=4)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"encoder_config|expected the tensors"):
        CuMoVisionModel.from_pretrained(tmp_path)
