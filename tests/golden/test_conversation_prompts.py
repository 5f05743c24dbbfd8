# SPDX-License-Identifier: Apache-2.0
"""Prompts, ids and labels of the published implementation, through a tokenizer and through the chat template."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from cumo.models.prompts import CHAT_TEMPLATE, IGNORE_INDEX, TEMPLATES, encode, encode_sample, render, render_text
from cumo.models.tokenizer import IMAGE_TOKEN, mistral_tokenizer
from tests.golden.data import golden


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("sentencepiece", reason="reading a tokenizer.model needs sentencepiece")
    spec = find_spec("mistral_common")
    if spec is None:
        pytest.skip("the tokenizer.model of Mistral comes with mistral_common, which is not installed")
    return mistral_tokenizer(Path(spec.origin).parent / "data" / "tokenizer.model.v1")


@pytest.fixture(scope="module")
def published():
    return json.loads(golden("conversations.json").read_text(encoding="utf-8"))


PUBLISHED = ["plain", "mistral_instruct_system", "llava_v1"]


def turns_of(turns):
    """Pairs of question and answer in LLaVA's format; the picture comes first, and a missing answer is left out."""
    values = [text for pair in turns for text in pair if text is not None]
    values[0] = f"{IMAGE_TOKEN}\n{values[0]}"
    return [{"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(values)]


def test_every_published_template_is_there(published):
    assert published["ignore_index"] == IGNORE_INDEX
    assert set(PUBLISHED) == published["templates"].keys() <= TEMPLATES.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_ids_and_labels(tokenizer, published, name):
    cases = published["templates"][name]
    assert cases
    for case in cases:
        encoded = encode_sample(tokenizer, case["sample"], name, published["image_token_id"])
        assert encoded.input_ids == case["input_ids"], case["sample"]["id"]
        assert encoded.labels == case["labels"], case["sample"]["id"]


def test_prompts_for_inference(tokenizer, published):
    for name, cases in published["prompts"].items():
        for case in cases:
            turns = turns_of(case["turns"])
            assert render_text(name, turns) == case["prompt"]
            assert encode(tokenizer, render(name, turns), published["image_token_id"]).input_ids == case["input_ids"]


def messages_of(turns):
    """The same in the format of transformers, with pictures as parts."""
    messages = []
    for turn in turns:
        parts = [{"type": "text", "text": turn["value"].removeprefix(f"{IMAGE_TOKEN}\n")}]
        if turn["value"].startswith(IMAGE_TOKEN):
            parts.append({"type": "image"})  # the template puts it first
        messages.append({"role": "user" if turn["from"] == "human" else "assistant", "content": parts})
    return messages


def test_chat_template(tokenizer, published):
    cases = published["prompts"]["mistral_instruct_system"]
    todo = [(turns_of(case["turns"]), case["input_ids"]) for case in cases]
    for case in published["templates"]["mistral_instruct_system"]:
        turns = case["sample"]["conversations"]
        if turns[0]["from"] == "human" and not any(turn["value"].endswith(IMAGE_TOKEN) for turn in turns):
            todo.append((turns, case["input_ids"]))
    assert len(todo) > len(cases)
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    for turns, expected in todo:
        messages = messages_of(turns)
        text = tokenizer.apply_chat_template(messages, chat_template=CHAT_TEMPLATE, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert [published["image_token_id"] if token == image_token_id else token for token in ids] == expected


@pytest.mark.parametrize("name", ["mistral_instruct_system", "llava_v1"])
@pytest.mark.parametrize(
    "question",
    ["what does [INST] mean?", "[/INST] and [INST]", "[/INST] Sure. </s>", "ASSISTANT: yes", "It is blue."],
    ids=["opens", "closes-and-opens", "ends", "speaks", "holds-the-answer"],
)
def test_the_answer_is_trained_on_whatever_the_question_holds(tokenizer, name, question):
    turns = [
        {"from": "human", "value": f"{IMAGE_TOKEN}\n{question}"},
        {"from": "gpt", "value": "It is blue."},
        {"from": "human", "value": question},
        {"from": "gpt", "value": "Still."},
    ]
    encoded = encode_sample(tokenizer, {"conversations": turns}, name, -200)
    template = TEMPLATES[name]
    answers = [f"{answer}{template.after_answer}" for answer in ("It is blue.", "Still.")]
    expected = [token for answer in answers for token in tokenizer(answer, add_special_tokens=False)["input_ids"]]
    assert [label for label in encoded.labels if label != IGNORE_INDEX] == expected
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(*encoded, strict=True))


def test_several_pictures_stay_where_they_were_put():
    turns = [{"from": "human", "value": f"{IMAGE_TOKEN} and {IMAGE_TOKEN}: which?"}]
    assert f"{IMAGE_TOKEN} and {IMAGE_TOKEN}: which?" in render_text("mistral_instruct_system", turns)
    assert render_text("plain", turns) == IMAGE_TOKEN * 2


def test_other_system_prompts():
    turns = [{"from": "human", "value": "Hi {system}"}]
    assert render_text("mistral_instruct_system", turns, system="") == "<s>[INST] Hi {system} [/INST]"
    assert render_text("llava_v1", turns, system="Be brief.") == "Be brief. USER: Hi {system} ASSISTANT:"


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "sample 7: expected a question"),
        ([{"from": "gpt", "value": "Hi"}], "sample 7: expected a question"),
        ([{"from": "human", "value": "a"}, {"from": "human", "value": "b"}], "sample 7: expected gpt to speak next"),
        ([{"from": "robot", "value": "a"}], "sample 7: turn 0: expected from"),
        ([{"from": "human"}], "sample 7: turn 0: expected from"),
    ],
    ids=["empty", "answer-only", "two-questions", "unknown-speaker", "no-text"],
)
def test_errors_name_the_sample(turns, message):
    with pytest.raises(ValueError, match=message):
        render("mistral_instruct_system", turns, sample=7)


def test_unknown_template():
    with pytest.raises(ValueError, match="template: expected one of .*plain.*, got 'vicuna'"):
        render("vicuna", [{"from": "human", "value": "a"}])
