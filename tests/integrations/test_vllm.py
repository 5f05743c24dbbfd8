# SPDX-License-Identifier: Apache-2.0
"""The folder for vLLM, taken as its Transformers backend takes it: found, built without a head, its weights by name,
its attention replaced, pictures and text embedded apart, placeholders located.

Where vLLM is installed, which is none of this project's dependencies, it answers itself."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cumo import CuMoConfig, CuMoForConditionalGeneration
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


# In a process of its own, which vLLM ends as it likes.
ENGINE = """
import json, sys
from PIL import Image
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    engine = LLM(
        sys.argv[1],
        model_impl="transformers",
        trust_remote_code=True,
        dtype="float32",
        max_model_len=256,
        enforce_eager=True,
        limit_mm_per_prompt={"image": 2},
    )
    answers = []
    for request in json.loads(sys.argv[2]):
        prompt = {"prompt_token_ids": request["ids"]}
        if request["images"]:
            prompt["multi_modal_data"] = {"image": [Image.open(path) for path in request["images"]]}
        output = engine.generate(prompt, SamplingParams(temperature=0, max_tokens=12))[0]
        answers.append([list(output.prompt_token_ids), list(output.outputs[0].token_ids)])
    print("ANSWERS", json.dumps(answers))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")
@pytest.mark.parametrize("text_type", ["mistral", "mixtral"])
def test_vllm_says_what_the_model_says(source, tmp_path, text_type):
    """Greedy tokens of prompts without a picture, with one and with two; of a dense language model and of experts."""
    config = CuMoConfig.from_pretrained(source)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
    fields = config.text_config.to_dict() | sizes | {"model_type": text_type, "head_dim": 64, "initializer_range": 0.3}
    if text_type == "mixtral":
        fields |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    model = CuMoForConditionalGeneration(CuMoConfig(vision_config=config.vision_config.to_dict(), text_config=fields))
    processor = AutoProcessor.from_pretrained(source)
    model.eval().save_pretrained(tmp_path / "source")
    processor.save_pretrained(tmp_path / "source")
    export(tmp_path / "source", tmp_path / "exported")
    requests, expected = [], []
    for count in range(3):
        pictures = [picture(count + index) for index in range(count)]
        paths = [str(tmp_path / f"{count}-{index}.png") for index in range(count)]
        for image, path in zip(pictures, paths, strict=True):
            image.save(path)
        prompt = f"<s><s>[INST] {'<image>' * count} What is this? [/INST]"
        ids = processor.prompt_ids(prompt)
        inputs = {"input_ids": torch.tensor([ids])}
        if pictures:
            inputs["pixel_values"] = processor(images=pictures, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
        expected.append([ids, answer])
        plain = processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]  # one placeholder for each picture
        requests.append({"ids": plain, "images": paths})
    (tmp_path / "engine.py").write_text(ENGINE)
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "engine.py", str(tmp_path / "exported"), json.dumps(requests)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("ANSWERS ")]
    assert json.loads(line.removeprefix("ANSWERS ")) == expected
