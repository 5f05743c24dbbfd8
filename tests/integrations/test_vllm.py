# SPDX-License-Identifier: Apache-2.0
"""The folder for vLLM, taken as its Transformers backend takes it: found, built without a head, its weights by name,
its attention replaced, pictures and text embedded apart, placeholders located. vLLM itself is not needed."""

import re

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cumo import CuMoForConditionalGeneration
from cumo.integrations.vllm import CuMoModel, export
from tests.inference.tiny import picture, save_model
from tests.models.tiny import tiny_model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source")
    save_model(path)
    return path


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "model"
    export(source, path)
    return path


@pytest.fixture
def config(folder):
    return AutoConfig.from_pretrained(folder, trust_remote_code=True)


def build(config):
    """As the backend does: on no device, from the configuration alone."""
    with torch.device("meta"):
        return AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=True)


def test_the_architecture_is_found_through_auto_map(folder, config):
    assert config.architectures == ["CuMoForConditionalGeneration"]
    for name in ("AutoConfig", "AutoModel"):
        found = get_class_from_dynamic_module(config.auto_map[name], str(folder))
        assert found.__module__.startswith("cumo.")
    assert issubclass(found, PreTrainedModel)
    assert found.is_backend_compatible()
    model = build(config)
    assert isinstance(model, CuMoModel)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_its_parts_are_where_the_backend_looks(config):
    model = build(config)
    assert type(model.get_decoder()).__name__ == "MistralModel"
    assert model.get_encoder(modality="image") is model.vision_tower
    for modality in ("audio", "video"):
        with pytest.raises(ValueError, match="modality: expected 'image'"):
            model.get_encoder(modality=modality)
    table = torch.nn.Embedding(32000, 32, device="meta")
    model.set_input_embeddings(table)
    assert model.get_input_embeddings() is table
    assert not [name for name, _ in model.named_parameters() if "lm_head" in name]


def load(folder, model):
    """The checkpoint's tensors, of which all but the head have their place by name."""
    with safe_open(next(folder.glob("*.safetensors")), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
    head = tensors.pop("language_model.lm_head.weight")
    assert {name for name, _ in model.named_parameters()} == set(tensors)
    model.load_state_dict(tensors, strict=False, assign=True)
    return head


def test_logits_are_those_of_the_model(folder, source):
    """Embeddings of pictures put between those of text, attention that is somebody else's, a head that is too."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    calls = []

    def attention(module, query, key, value, attention_mask, **kwargs):
        calls.append(module.layer_idx)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, is_causal=True, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("another_engine", attention)
    config.text_config._attn_implementation = "another_engine"
    model = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=True).eval()
    head = load(folder, model)
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor([picture(), picture(1)], "a <image> b <image> c", return_tensors="pt")
    ids = inputs["input_ids"][0]
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
        is_image = ids == processor.image_token_id
        embeddings = model.get_input_embeddings()(ids.masked_fill(is_image, 0))
        embeddings[is_image] = features.flatten(0, 1)
        hidden = model(
            input_ids=None,
            inputs_embeds=embeddings[None],
            use_cache=False,
            position_ids=torch.arange(len(ids))[None],
            return_dict=False,
        )[0][0]
        expected = CuMoForConditionalGeneration.from_pretrained(source)(**inputs).logits[0]
    assert calls == list(range(config.text_config.num_hidden_layers))  # of the decoder, and none of the encoder
    torch.testing.assert_close(hidden @ head.T, expected, rtol=1e-4, atol=1e-4)


def test_the_processor_locates_placeholders(folder):
    processor = AutoProcessor.from_pretrained(folder)
    sizes = processor._get_num_multimodal_tokens(image_sizes=([20, 30], [10_000, 10_000]))
    assert sizes["num_image_tokens"] == [16, 16]
    assert sizes["num_image_patches"] == [1, 1]
    text = f"a {processor.image_token} b{processor.image_token}"
    batch = processor(
        text=text, images=[picture(), picture(1)], return_text_replacement_offsets=True, return_tensors="pt"
    )
    (entries,) = batch["text_replacement_offsets"]
    expanded = re.sub("<image>", "<image>" * 16, text)
    for entry, begin in zip(entries, (2, 11), strict=True):
        assert entry["type"] == "image"
        assert entry["span"] == (begin, begin + 7)
        assert entry["text"] == "<image>"
        assert expanded[slice(*entry["new_span"])] == entry["replacement"] == "<image>" * 16
        ids = processor.tokenizer(entry["replacement"], add_special_tokens=False)["input_ids"]
        assert ids == [processor.image_token_id] * 16
    assert len(batch["pixel_values"]) == 2
    plain = processor(text=text, images=[picture(), picture(1)])
    assert "text_replacement_offsets" not in plain


def test_the_folder_is_read_by_this_package_too(folder, source):
    exported, original = (CuMoForConditionalGeneration.from_pretrained(path).state_dict() for path in (folder, source))
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], original[name]) for name in original)


def test_what_is_not_exported(source, folder, tmp_path):
    with pytest.raises(ValueError, match="target: expected an empty folder, got"):
        export(source, folder)
    processor = AutoProcessor.from_pretrained(source)
    large = tiny_model(vision={"high_resolution": True})
    large.save_pretrained(tmp_path / "large")
    processor.save_pretrained(tmp_path / "large")
    with pytest.raises(ValueError, match="source: expected a model that takes pictures at one size"):
        export(tmp_path / "large", tmp_path / "target")
