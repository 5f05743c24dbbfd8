# SPDX-License-Identifier: Apache-2.0
"""Models assembled of an encoder and a language model compute what their parts do."""

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="CuMo is built on transformers")

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    PreTrainedTokenizerFast,
)

from cumo.checkpoints.assemble import assemble_checkpoint, assemble_processor
from cumo.models.cumo import CuMoForConditionalGeneration
from cumo.models.processor import CuMoProcessor
from cumo.models.tokenizer import mistral_tokenizer
from tests.data.samples import byte_tokenizer
from tests.models.tiny import ENCODER, TEXT
from tests.numerics import relative_error
from tests.train.tiny import write_parts

VISION = {key: value for key, value in ENCODER.items() if key != "model_type"}


def write_vision(folder, kind):
    """An encoder as transformers saves it; the model that computes its features."""
    torch.manual_seed(1)
    if kind == "whole-clip":
        text = CLIPTextConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        config = CLIPConfig(text_config=text.to_dict(), vision_config=VISION, projection_dim=8)
        model = CLIPModel(config)
        model.save_pretrained(folder)
        return model.vision_model.eval()
    model = AutoModel.from_config(AutoConfig.for_model(f"{kind}_vision_model", **VISION))
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture
def text(tmp_path):
    return Path(write_parts(tmp_path / "parts")["text"])


@pytest.mark.parametrize("kind", ["clip", "whole-clip", "siglip"])
def test_features_are_those_of_the_encoder(tmp_path, text, kind):
    encoder = write_vision(tmp_path / "vision", kind)
    assemble_checkpoint(tmp_path / "vision", text, tmp_path / "model", scales=[1])
    model = CuMoForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    pixels = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        features = model.vision_tower(pixels).features
        expected = encoder(pixels, output_hidden_states=True).hidden_states[-2]
    assert relative_error(features, expected if kind == "siglip" else expected[:, 1:]) <= 1e-6
    assert model.config.vision_config.num_experts == model.config.connector_num_experts == 1


@pytest.mark.parametrize("text_type", ["llama", "mixtral"])
def test_the_language_model_is_as_it_was(tmp_path, text_type):
    parts = write_parts(tmp_path / "parts", text_type)
    assemble_checkpoint(Path(parts["vision"]), Path(parts["text"]), tmp_path / "model", scales=[1, 2])
    model = CuMoForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    alone = AutoModelForCausalLM.from_pretrained(parts["text"]).eval()
    ids = torch.tensor([[1, 5, 6, 7, 8]])
    with torch.no_grad():
        assert relative_error(model(input_ids=ids).logits, alone(input_ids=ids).logits) <= 1e-5


def test_tied_embeddings_stay_tied(tmp_path):
    parts = write_parts(tmp_path / "parts")
    config = AutoConfig.for_model("llama", **{**TEXT, "vocab_size": len(byte_tokenizer()), "tie_word_embeddings": True})
    AutoModelForCausalLM.from_config(config).save_pretrained(parts["text"])
    assemble_checkpoint(Path(parts["vision"]), Path(parts["text"]), tmp_path / "model")
    model = CuMoForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_processor(tmp_path, text):
    write_vision(tmp_path / "vision", "clip")
    preprocessing = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25], "resample": 2, "size": 999}
    (tmp_path / "vision" / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    assemble_checkpoint(tmp_path / "vision", text, tmp_path / "model", high_resolution=True)
    processor = CuMoProcessor.from_pretrained(tmp_path / "model")
    model = CuMoForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert processor.image_token_id == model.config.image_token_id
    assert (processor.image_seq_length, processor.high_resolution_size) == (9, 36)
    assert list(processor.image_processor.image_mean) == [0.5] * 3 and processor.image_processor.resample == 2
    assert processor.image_processor.size["shortest_edge"] == 12
    alone = assemble_processor(tmp_path / "vision", text, largest_scale=3)
    assert alone.to_dict() == processor.to_dict()


def test_the_tokenizer_of_mistral(tmp_path, text):
    mistral_common = pytest.importorskip("mistral_common", reason="holds the tokenizer model of Mistral")
    write_vision(tmp_path / "vision", "clip")
    source = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    shutil.copyfile(source, text / "tokenizer.model")
    processor = assemble_processor(tmp_path / "vision", text)
    assert processor.image_token_id == 32000
    assert processor.tokenizer("[INST]", add_special_tokens=False)["input_ids"] == [733, 16289, 28793]


def test_tokens_added_to_a_tokenizer_of_mistral(tmp_path, text):
    """As in Phi-3 or OpenHermes: answers end with a token that tokenizer.model does not know."""
    mistral_common = pytest.importorskip("mistral_common", reason="holds the tokenizer model of Mistral")
    write_vision(tmp_path / "vision", "clip")
    (text / "tokenizer.json").unlink()
    shutil.copyfile(Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1", text / "tokenizer.model")
    source = mistral_tokenizer(text / "tokenizer.model", image_token="<|im_end|>")
    source.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    source.save_pretrained(text)
    tokenizer = assemble_processor(tmp_path / "vision", text).tokenizer
    assert tokenizer.eos_token_id == source.eos_token_id == 32000
    for words in ("<|im_start|>user", "hello  world<|im_end|>"):
        assert tokenizer(words)["input_ids"] == source(words)["input_ids"]
    assert tokenizer.convert_tokens_to_ids("<image>") == 32002
    (text / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="expected a tokenizer.json, for .* added tokens <|im_end|>, <|im_start|>"):
        assemble_processor(tmp_path / "vision", text)


def test_a_sentencepiece_model_of_another_kind(tmp_path, text):
    sentencepiece = pytest.importorskip("sentencepiece", reason="training a tokenizer.model needs sentencepiece")
    write_vision(tmp_path / "vision", "clip")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog"] * 50),
        model_prefix=str(text / "tokenizer"),
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=False,
        vocab_size=300,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    expected = PreTrainedTokenizerFast.from_pretrained(text)("the dog")["input_ids"]
    assert assemble_processor(tmp_path / "vision", text).tokenizer("the dog")["input_ids"] == expected
    (text / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="for path: expected a SentencePiece model that splits text as Mistral's"):
        assemble_processor(tmp_path / "vision", text)


def test_the_seed_draws_the_connector(tmp_path, text):
    write_vision(tmp_path / "vision", "clip")
    weights = []
    for number, seed in enumerate((0, 0, 1)):
        assemble_checkpoint(tmp_path / "vision", text, tmp_path / f"model-{number}", seed=seed)
        model = CuMoForConditionalGeneration.from_pretrained(tmp_path / f"model-{number}")
        weights.append(model.connector.projection[0].weight.detach())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_what_fits_not(tmp_path, text):
    write_vision(tmp_path / "vision", "clip")
    target = tmp_path / "model"
    with pytest.raises(ValueError, match="expected a CLIP or SigLIP vision model, got model_type 'llama'"):
        assemble_checkpoint(text, text, target)
    with pytest.raises(ValueError, match="expected a language model, got model_type 'clip_vision_model'"):
        assemble_checkpoint(tmp_path / "vision", tmp_path / "vision", target)
    with pytest.raises(ValueError, match="expected the configuration of a model, found no such file"):
        assemble_checkpoint(tmp_path / "absent", text, target)
    config = json.loads((tmp_path / "vision" / "config.json").read_text())
    (tmp_path / "vision" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(ValueError, match="expected the tensors of its configuration, missing .*layers.3"):
        assemble_checkpoint(tmp_path / "vision", text, target)
    settings = json.loads((text / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (text / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="expected a tokenizer with an EOS token"):
        assemble_checkpoint(tmp_path / "vision", text, target)
    assert not target.exists()
