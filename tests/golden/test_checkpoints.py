# SPDX-License-Identifier: Apache-2.0
"""Published checkpoints through files: loaded, converted both ways, upcycled; what they compute stays the same."""

import json
import shutil

import pytest
import torch

pytest.importorskip("transformers", reason="CuMo is built on transformers")

from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from cumo.checkpoints.convert import convert_to_native, convert_to_published
from cumo.checkpoints.files import open_file
from cumo.checkpoints.published import native_name, to_published
from cumo.checkpoints.upcycle import Upcycling, upcycle_tensors
from cumo.config import CuMoConfig, CuMoVisionConfig
from cumo.models.connector import CuMoConnector
from cumo.models.cumo import CuMoForConditionalGeneration
from cumo.models.vision import CuMoVisionModel
from tests.golden.data import below, golden, load_tensors
from tests.numerics import assert_bitwise_equal, relative_error

MODELS = ["mistral", "mixtral"]


@pytest.fixture(params=MODELS)
def folder(request):
    """A published checkpoint."""
    return golden(f"checkpoint_cumo_{request.param}")


@pytest.mark.parametrize("load", [CuMoForConditionalGeneration, AutoModelForImageTextToText], ids=["CuMo", "Auto"])
def test_loaded_bit_by_bit(folder, load):
    model = load.from_pretrained(folder)
    assert isinstance(model, CuMoForConditionalGeneration)
    assert_bitwise_equal(to_published(model.state_dict()), load_file(folder / "model.safetensors"))


def test_the_configuration_says_what_the_published_one_says(folder):
    published = json.loads((folder / "config.json").read_text())
    config = CuMoConfig.from_pretrained(folder)
    assert config.vision_config.scales == published["scales"]
    assert config.vision_config.num_experts == config.connector_num_experts == published["num_experts"]
    assert config.vision_config.num_experts_per_tok == published["num_selected"]
    assert config.balance_loss_coef == published["balance_loss_coef"]
    assert config.router_z_loss_coef == published["router_z_loss_coef"]
    text = config.text_config
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "vocab_size"):
        assert getattr(text, name) == published[name], name
    assert text.rope_parameters["rope_theta"] == published["rope_theta"]
    assert getattr(text, "num_local_experts", None) == published.get("num_local_experts")


def test_converted_there_and_back_bit_by_bit(folder, tmp_path):
    convert_to_native(folder, tmp_path / "native")
    convert_to_published(tmp_path / "native", tmp_path / "published")
    assert_bitwise_equal(
        load_file(tmp_path / "published" / "model.safetensors"), load_file(folder / "model.safetensors")
    )
    loaded = [CuMoForConditionalGeneration.from_pretrained(path) for path in (folder, tmp_path / "native")]
    assert_bitwise_equal(*(model.state_dict() for model in loaded))
    configs = [model.config.to_diff_dict() | {"architectures": None} for model in loaded]
    assert configs[0] == configs[1]


def scales_of_the_stages():
    """The first stages were trained with the scales of the last."""
    return json.loads((golden("checkpoint_cumo_mistral") / "config.json").read_text())["scales"]


def upcycled(file, prefix, part, num_experts):
    """Native tensors of a part, from a file of a first stage."""
    tensors = {native_name(prefix + name): tensor for name, tensor in open_file(golden(file)).items()}
    return dict(upcycle_tensors(tensors.items(), Upcycling(**{part: num_experts}, top_k=2, seed=3)))


@pytest.mark.parametrize("num_experts", [2, 5])
def test_upcycled_stages_compute_the_same(num_experts, device):
    expected, _ = load_tensors("dense_stage.safetensors", device)
    encoder = json.loads((golden("tiny_clip") / "config.json").read_text())
    scales = scales_of_the_stages()
    vision = CuMoVisionConfig(encoder_config=encoder, num_experts=num_experts, num_experts_per_tok=2, scales=scales)
    tower = CuMoVisionModel(vision).to(device)
    tower.load_state_dict(below(upcycled("clip.bin", "model.vision_tower.", "vision", num_experts), "vision_tower."))
    features = tower(expected["pixel_values"]).features
    assert relative_error(features, expected["dense_features"]) <= 1e-5

    state = below(upcycled("mm_projector.bin", "", "connector", num_experts), "connector.")
    width = state["projection.down_proj"].shape[1]
    config = CuMoConfig(
        vision_config=vision,
        text_config={"hidden_size": width, "num_attention_heads": 1, "num_key_value_heads": 1},
        connector_num_experts=num_experts,
    )
    connector = CuMoConnector(config).to(device)
    connector.load_state_dict(state)
    assert relative_error(connector(features)[0], expected["connector_out"]) <= 1e-5


@pytest.mark.parametrize("kind", ["second stage", "first stage"])
def test_stages_with_their_parts_in_files_of_their_own(kind, tmp_path):
    """clip.bin and mm_projector.bin beside a language model; mm_projector.bin alone, with the rest from elsewhere."""
    source = golden("checkpoint_cumo_mistral")
    published = json.loads((source / "config.json").read_text())
    published |= {"clip_smoe": False, "mlp_smoe": False, "mm_projector_type": "mlp2x_gelu", "num_experts": 1}
    published |= {"num_selected": 1, "scales": ",".join(map(str, scales_of_the_stages())), "mm_vision_tower": "encoder"}
    stage, base = tmp_path / "stage", tmp_path / "base"
    stage.mkdir(), base.mkdir()
    (stage / "config.json").write_text(json.dumps(published))
    shutil.copytree(golden("tiny_clip"), tmp_path / "encoder")
    shutil.copyfile(golden("mm_projector.bin"), stage / "mm_projector.bin")
    text = {name: t for name, t in load_file(source / "model.safetensors").items() if "vision" not in name}
    text = {name: tensor for name, tensor in text.items() if "mm_projector" not in name}
    torch.save(text, (stage if kind == "second stage" else base) / "pytorch_model.bin")
    clip = torch.load(golden("clip.bin"), weights_only=True)
    if kind == "second stage":
        torch.save(clip, stage / "clip.bin")
    else:
        torch.save(clip, tmp_path / "encoder" / "pytorch_model.bin")
    model = CuMoForConditionalGeneration.from_pretrained(stage, model_base=base)
    expected, _ = load_tensors("dense_stage.safetensors")
    image = model.get_image_features(expected["pixel_values"])
    assert relative_error(image.embeddings, expected["connector_out"]) <= 1e-5
    assert torch.equal(model.language_model.lm_head.weight, text["lm_head.weight"])
