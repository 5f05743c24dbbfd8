# SPDX-License-Identifier: Apache-2.0
"""lmms-eval and VLMEvalKit: their requests become conversations, answers come back in order.

Stand-ins with the documented interfaces take the place of both, so that these tests run without them; where lmms-eval
is installed, its own registry has to find the model.
"""

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("transformers", reason="CuMo is built on transformers")

from cumo.inference import CuMoPipeline, GenerationOptions
from cumo.integrations import lmms_eval as adapter
from tests.inference.tiny import ask, picture, save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny checkpoint."""
    path = tmp_path_factory.mktemp("model")
    save_model(path)
    return path


def stand_in(monkeypatch, name, **members):
    """A module, and the packages above it."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        full = ".".join(parts[:depth])
        if full not in sys.modules:
            monkeypatch.setitem(sys.modules, full, ModuleType(full))
    vars(sys.modules[name]).update(members)


class ChatMessages:
    """What lmms-eval's protocol does with text and media."""

    def __init__(self, messages):
        self.messages = messages

    def extract_media(self):
        found = {kind: [] for kind in ("image", "video", "audio")}
        for message in self.messages:
            for part in message["content"]:
                if part["type"] in found:
                    found[part["type"]].append(part["url"])
        return tuple(found.values())

    def to_hf_messages(self):
        return [
            {
                "role": message["role"],
                "content": [
                    {"type": "image", "image": part["url"]} if part["type"] == "image" else part
                    for part in message["content"]
                ],
            }
            for message in self.messages
        ]


@dataclass
class TokenCounts:
    input_tokens: int
    output_tokens: int


@dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts


@pytest.fixture
def lmms(monkeypatch):
    """lmms-eval, or what stands in for it."""
    if importlib.util.find_spec("lmms_eval") is not None:
        pytest.skip("lmms-eval is installed: its own runner is to be used")
    stand_in(monkeypatch, "lmms_eval.api.instance", GenerationResult=GenerationResult, TokenCounts=TokenCounts)
    stand_in(monkeypatch, "lmms_eval.protocol", ChatMessages=ChatMessages)


def to_messages(document):
    """A task's own function."""
    parts = [{"type": "image", "url": document["image"]}, {"type": "text", "text": document["question"]}]
    return [{"role": "user", "content": parts}]


@pytest.mark.usefixtures("lmms")
def test_answers_of_lmms_eval_come_in_the_order_of_its_requests(folder):
    pipeline = CuMoPipeline.from_pretrained(folder, device="cpu")
    documents = [{"image": picture(index), "question": f"What is shown, {index}?"} for index in range(5)]
    settings = [{"max_new_tokens": 3 + index % 2, "do_sample": False, "temperature": 0} for index in range(5)]
    requests = [
        SimpleNamespace(args=("ctx", to_messages, settings[index], index, "task", "test")) for index in (3, 0, 4, 1, 2)
    ]
    seen, sizes, generate = [], [], pipeline.generate

    def counted(conversations, options):
        sizes.append(len(conversations))
        return generate(conversations, options)

    pipeline.generate = counted
    results = adapter.answer(pipeline, requests, lambda *place: documents[place[2]], 2, seen.append)
    for request, result in zip(requests, results, strict=True):
        index = request.args[3]
        conversation = ask(documents[index]["image"], documents[index]["question"])
        options = GenerationOptions(max_new_tokens=settings[index]["max_new_tokens"])
        (expected,) = generate([conversation], options)
        assert result.text == expected.text
        assert result.token_counts == TokenCounts(expected.prompt_tokens, expected.completion_tokens)
    assert sum(seen) == 5 and max(sizes) == 2, "requests of the same settings share a batch, others do not"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, GenerationOptions(1024, seed=0)),
        (
            {"max_new_tokens": 7, "temperature": 0, "num_beams": 1, "until": "\n"},
            GenerationOptions(7, stop="\n", seed=0),
        ),
        ({"temperature": 0.5, "top_p": None}, GenerationOptions(1024, temperature=0.5, seed=0)),
        ({"temperature": 0.5, "do_sample": False}, GenerationOptions(1024, seed=0)),
        ({"do_sample": True, "top_p": 0.9, "until": ["a", "b"]}, GenerationOptions(1024, 1.0, 0.9, ("a", "b"), 0)),
    ],
    ids=["default", "greedy", "sampled", "not sampled", "nucleus"],
)
def test_settings_of_tasks(settings, expected):
    assert adapter.options_of(settings) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 5}, "num_beams: expected 1, got 5"),
        ({"typical_p": 1}, r"expected keys of .*, got \['typical_p'\]"),
    ],
)
def test_settings_that_the_pipeline_does_not_have(settings, message):
    with pytest.raises(ValueError, match=message):
        adapter.options_of(settings)


@pytest.mark.usefixtures("lmms")
def test_videos_are_refused():
    messages = [{"role": "user", "content": [{"type": "video", "url": "x.mp4"}]}]
    with pytest.raises(ValueError, match="expected text and pictures, got 1 videos and 0 sounds"):
        adapter.conversation_of(messages)


def test_the_entry_point_is_declared():
    (entry,) = (e for e in entry_points(group="lmms_eval.models") if e.name == "cumo")
    assert entry.load() is adapter.manifest


def test_the_registry_of_lmms_eval_finds_the_model():
    registry = pytest.importorskip(
        "lmms_eval.models.registry_v2", reason="lmms-eval is not installed"
    ).ModelRegistryV2()
    registry.load_entrypoint_manifests()
    assert registry.get_model_class("cumo").__name__ == "CuMoChat"


class BaseModel:
    """VLMEvalKit's, as far as its models are called."""

    def __init__(self):
        self.dump_image_func = None


@pytest.fixture
def vlmeval(monkeypatch):
    """Our module beside what stands in for VLMEvalKit."""
    stand_in(monkeypatch, "vlmeval.vlm.base", BaseModel=BaseModel)
    stand_in(monkeypatch, "vlmeval.config", supported_VLM={"llava": None})
    monkeypatch.delitem(sys.modules, "cumo.integrations.vlmeval", raising=False)
    yield importlib.import_module("cumo.integrations.vlmeval")
    sys.modules.pop("cumo.integrations.vlmeval", None)


def test_messages_of_vlmevalkit_are_answered(vlmeval, folder, tmp_path):
    path = tmp_path / "picture.png"
    picture(0).save(path)
    vlmeval.register("cumo-tiny", str(folder), max_new_tokens=3, device="cpu")
    model = sys.modules["vlmeval.config"].supported_VLM["cumo-tiny"]()
    message = [{"type": "image", "value": str(path)}, {"type": "text", "value": "What is shown?"}]
    pipeline, options = model.pipeline, GenerationOptions(max_new_tokens=3)
    (expected,) = pipeline.generate([ask(picture(0), "What is shown?")], options)
    assert model.generate_inner(message, dataset="MMBench_DEV_EN") == expected.text
    turns = [
        {"role": "user", "content": message},
        {"role": "assistant", "content": [{"type": "text", "value": "A dog."}]},
        {"role": "user", "content": [{"type": "text", "value": "Why?"}]},
    ]
    conversation = [
        *ask(picture(0), "What is shown?"),
        {"role": "assistant", "content": "A dog."},
        {"role": "user", "content": "Why?"},
    ]
    (expected,) = pipeline.generate([conversation], options)
    assert model.chat_inner(turns) == expected.text


def test_names_and_media_that_vlmevalkit_must_not_give(vlmeval):
    with pytest.raises(ValueError, match="name: expected one that VLMEvalKit does not have, got 'llava'"):
        vlmeval.register("llava", "x")
    with pytest.raises(ValueError, match="message: expected text and images, got 'video'"):
        vlmeval.content_of([{"type": "video", "value": "x.mp4"}])
