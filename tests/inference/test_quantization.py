# SPDX-License-Identifier: Apache-2.0
"""Quantised loading: the linear layers of the language model, and nothing else."""

import importlib.util

import pytest
import torch

from cumo import CuMoConfig, CuMoForConditionalGeneration
from cumo.inference import CuMoPipeline, GenerationOptions
from cumo.models.quantization import NOT_QUANTIZED, quantization_config
from tests.inference.tiny import ask, picture

HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not HAS_BITSANDBYTES, reason="needs bitsandbytes")


def save(pipeline, path, **text):
    """A model whose widths are multiples of the 64 weights that nf4 scales together."""
    config = CuMoConfig.from_preset("tiny")
    fields = config.text_config.to_dict() | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16} | text
    config = CuMoConfig(vision_config=config.vision_config.to_dict(), text_config=fields)
    CuMoForConditionalGeneration(config).save_pretrained(path)
    pipeline.processor.save_pretrained(path)


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_only_the_language_model_is_quantised(pipeline, tmp_path, kind):
    save(pipeline, tmp_path)
    quantised = CuMoPipeline.from_pretrained(tmp_path, quantization=kind, device="cpu")
    names = {name for name, module in quantised.model.named_modules() if "bitsandbytes" in type(module).__module__}
    layers = [f"language_model.model.layers.{index}" for index in range(2)]
    attention = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    assert names == {
        f"{layer}.{name}" for layer in layers for name in [*attention, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    }
    plain = CuMoPipeline.from_pretrained(tmp_path, device="cpu")
    actual, expected = (each.picture_embeddings(each.prepare_picture(picture())) for each in (quantised, plain))
    torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.05)
    (completion,) = quantised.generate([ask("What is this?", picture())], GenerationOptions(max_new_tokens=4))
    assert completion.text


@pytest.mark.skipif(HAS_BITSANDBYTES, reason="bitsandbytes is installed")
def test_bitsandbytes_is_named_where_it_is_missing(folder):
    with pytest.raises(ImportError, match="quantization: 'nf4' needs the package bitsandbytes, which is not installed"):
        CuMoPipeline.from_pretrained(folder, quantization="nf4")


def test_stacked_experts_are_refused(pipeline, tmp_path):
    save(pipeline, tmp_path, model_type="mixtral", num_local_experts=4, num_experts_per_tok=2)
    message = "quantization: expected a language model of linear layers, got mixtral with num_local_experts=4"
    with pytest.raises(ValueError, match=message):
        CuMoPipeline.from_pretrained(tmp_path, quantization="int8", device="cpu")


def test_what_keeps_its_precision(monkeypatch):
    """By the rule that transformers itself applies to a module's name."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = [
        "vision_tower.layers.0.self_attn.q_proj",
        "vision_tower.layers.0.mlp.gate",
        "connector.projection.gate",
        "connector.projection.0",
        "language_model.lm_head",
        "language_model.model.layers.3.mlp.gate",
        "language_model.model.layers.3.mlp.shared_expert_gate",
        "language_model.model.layers.3.block_sparse_moe.router.layer",
    ]
    quantised = [
        "language_model.model.layers.3.mlp.gate_proj",
        "language_model.model.layers.3.mlp.down_proj",
        "language_model.model.layers.13.self_attn.q_proj",
    ]
    assert [name for name in kept + quantised if not should_convert_module(name, NOT_QUANTIZED)] == kept
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr("cumo.models.quantization.BitsAndBytesConfig", dict)
    assert quantization_config("int8")["llm_int8_skip_modules"] == NOT_QUANTIZED
    nf4 = quantization_config("nf4", torch.float16)
    assert nf4["llm_int8_skip_modules"] == NOT_QUANTIZED
    assert (nf4["bnb_4bit_quant_type"], nf4["bnb_4bit_compute_dtype"]) == ("nf4", torch.float16)
