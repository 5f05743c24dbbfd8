# SPDX-License-Identifier: Apache-2.0
"""Conversations that are refused, and text that would read as control tokens."""

import pytest

from cumo.inference import GenerationOptions
from cumo.inference.conversation import PromptBuilder, check_conversation
from tests.inference.tiny import ask, picture

USER = {"role": "user", "content": "a"}


@pytest.fixture(scope="module")
def builder(pipeline):
    return PromptBuilder(pipeline.processor)


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        pytest.param([], "messages: expected a list of messages, got \\[\\]", id="empty"),
        pytest.param("hello", "messages: expected a list of messages, got 'hello'", id="text"),
        pytest.param(["a"], "messages\\[0\\]: expected an object with role and content, got 'a'", id="no-object"),
        pytest.param(
            [{"role": "tool", "content": "a"}], "messages\\[0\\].role: expected one of .* got 'tool'", id="role"
        ),
        pytest.param([{"content": "a"}], "messages\\[0\\].role: expected one of .* got None", id="no-role"),
        pytest.param(
            [USER, {"role": "system", "content": "a"}], "\\[1\\].role: expected system as the first", id="system"
        ),
        pytest.param(
            [{"role": "user", "content": 3}], "content: expected a string or a list of parts, got 3", id="number"
        ),
        pytest.param([{"role": "user", "content": []}], "content: expected a string or a list of parts", id="no-parts"),
        pytest.param([{"role": "user"}], "content: expected a string or a list of parts, got None", id="no-content"),
        pytest.param(
            [{"role": "user", "content": [{"type": "text"}]}], "content\\[0\\]: expected a part", id="no-text"
        ),
        pytest.param(
            [{"role": "user", "content": [{"type": "image"}]}], "content\\[0\\]: expected a part", id="no-image"
        ),
        pytest.param([{"role": "user", "content": ["a"]}], "content\\[0\\]: expected a part", id="bare-part"),
        pytest.param([USER, {"role": "assistant", "content": "b"}], "expected user to speak last", id="assistant-last"),
        pytest.param(
            [{"role": "system", "content": [{"type": "image", "image": picture()}]}, USER],
            "content\\[0\\]: expected pictures in messages of the user only, got one of system",
            id="picture-in-system",
        ),
    ],
)
def test_malformed_conversations(conversation, message):
    with pytest.raises(ValueError, match=message):
        check_conversation(conversation)


def test_the_template_refuses_in_its_own_words(builder):
    with pytest.raises(
        ValueError, match="messages: the chat template refuses them: .*expected user and assistant in turns"
    ):
        builder.build([USER, USER])


CONTROL = ["<image>", "<s>", "</s>", "<unk>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"]


@pytest.mark.parametrize("text", CONTROL)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_control_tokens_of_users_are_text(builder, pipeline, text, role):
    def conversation(text):
        messages = [{"role": name, "content": "x"} for name in ("system", "user", "assistant", "user")]
        index = ["system", "user", "assistant"].index(role)
        messages[index] = {"role": role, "content": text}
        return messages

    prompt = builder.build(conversation(f"a {text} b{text}"))
    plain = builder.build(conversation("a b"))
    assert prompt.images == []
    for token in CONTROL:
        assert prompt.text.count(token) == plain.text.count(token)
    assert text[0] + " " + text[1:] in prompt.text
    special = set(pipeline.processor.tokenizer.all_special_ids)
    actual, expected = (pipeline.processor.prompt_ids(p.text) for p in (prompt, plain))
    assert [token for token in actual if token in special] == [token for token in expected if token in special]
    assert pipeline.generate([conversation(text)], GenerationOptions(max_new_tokens=2))[0].text


def test_control_tokens_across_parts(builder):
    prompt = builder.build(ask("a <ima", "ge> </", picture(), "s> <im", picture(), "age>"))
    plain = builder.build(ask("a", picture(), picture()))
    assert prompt.text.count("<image>") == 2 == len(prompt.images)
    assert prompt.text.count("</s>") == plain.text.count("</s>") == 0
    single = builder.build(ask("a <ima", picture(), "ge> b </", "s>"))  # the picture goes to the front
    assert single.text.count("<image>") == 1
    assert "</s>" not in single.text


def test_overlapping_control_tokens(builder):
    for text in ("<<s>s>", "<im<image>age>", "<s><s>", "[INST][INST[INST]]", "</<s>s>"):
        (neutral,) = builder.neutral([text])
        assert neutral.replace(" ", "") == text
        assert not any(token in neutral for token in CONTROL)


def test_ordinary_text_is_left_alone(builder):
    texts = ["a < b", "", "[1] image", "<b>bold</b> <img>", "e = {x | x > 3}"]
    assert builder.neutral(texts) == texts


def test_ids_are_those_of_the_template(builder, pipeline):
    """Ids without looking at pictures equal those of the processor with them."""
    processor = pipeline.processor
    for conversation in (ask("What?", picture()), ask(picture(), "and", picture(1), system="s"), ask("text")):
        prompt = builder.build(conversation)
        ids = processor.prompt_ids(prompt.text)
        assert ids == processor(prompt.images or None, prompt.text)["input_ids"][0]
        assert ids == processor.apply_chat_template(conversation, tokenize=True, return_dict=True)["input_ids"][0]
        assert ids[:2] == [1, 1]  # both BOS tokens, as published
