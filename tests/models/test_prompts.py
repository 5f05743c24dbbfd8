# SPDX-License-Identifier: Apache-2.0
"""Templates with the control tokens of any tokenizer, as text, as ids and as Jinja."""

import pytest

pytest.importorskip("transformers", reason="tokenizers are those of transformers")

from cumo.data.encoding import SampleEncoder
from cumo.data.formats import parse_row
from cumo.models.processor import CuMoProcessor, clip_image_processor
from cumo.models.prompts import (
    CHAT_TEMPLATE,
    IGNORE_INDEX,
    TEMPLATES,
    chat_template,
    chat_templates,
    encode_sample,
    render,
    render_text,
)
from cumo.models.tokenizer import IMAGE_TOKEN
from tests.data.samples import byte_tokenizer

TOKENS = [
    pytest.param("<s>", "</s>", id="mistral"),
    pytest.param("<|begin|>", "<|end|>", id="another-bos"),
    pytest.param(None, "<|end|>", id="no-bos"),
]
SYSTEMS = [pytest.param(None, id="its-own-system"), pytest.param('Be "brief" {{ now }}.\n', id="another"), ""]
CHAT = [name for name, template in TEMPLATES.items() if not template.only_images]
TURNS = [
    {"from": "human", "value": f"{IMAGE_TOKEN}\nWhat?"},
    {"from": "gpt", "value": "A cat."},
    {"from": "human", "value": "Why?"},
]


def messages_of(turns, system):
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [
        {"role": "user" if turn["from"] == "human" else "assistant", "content": turn["value"]} for turn in turns
    ]


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize(("bos", "eos"), TOKENS)
@pytest.mark.parametrize("name", CHAT)
def test_the_chat_template_is_the_template(name, bos, eos, system):
    tokenizer = byte_tokenizer(bos, eos)
    template = TEMPLATES[name].with_tokens(tokenizer)
    for turns in (TURNS, TURNS[:1], TURNS[:2]):
        expected = (bos or "") + render_text(template, turns, system=system)
        actual = tokenizer.apply_chat_template(
            messages_of(turns, system), chat_template=chat_template(name), tokenize=False
        )
        assert actual == expected


@pytest.mark.parametrize(("bos", "eos"), TOKENS)
@pytest.mark.parametrize("name", CHAT)
def test_what_is_asked_begins_as_what_is_trained(name, bos, eos):
    processor = CuMoProcessor(
        clip_image_processor(12), byte_tokenizer(bos, eos), image_seq_length=4, chat_template=chat_template(name)
    )
    row = {"conversations": [*TURNS, {"from": "gpt", "value": "Because."}], "image": "a.png"}
    trained = SampleEncoder(processor, name)(parse_row(row))
    text = processor.apply_chat_template(messages_of(TURNS, None), tokenize=False)
    asked = processor.prompt_ids(text)
    assert trained.input_ids[: len(asked)] == asked
    assert (trained.input_ids[0] == processor.tokenizer.bos_token_id) == (bos is not None)
    answer = [token for token in trained.labels[len(asked) :] if token != IGNORE_INDEX]
    assert answer[-1] == processor.tokenizer.eos_token_id
    assert processor.tokenizer.decode(answer).strip().startswith("Because.")


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_nothing_stands_in_for_a_bos(name):
    tokenizer = byte_tokenizer(None, "<|end|>")
    encoded = encode_sample(tokenizer, {"conversations": TURNS[:2]}, name, -200)
    text = "".join(tokenizer.convert_ids_to_tokens([token for token in encoded.input_ids if token >= 0]))
    assert "<s>" not in text and "</s>" not in text
    assert (encoded.labels[-1] == tokenizer.eos_token_id) == (name != "plain")


def test_an_eos_is_needed():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="tokenizer: expected one with an EOS token"):
        TEMPLATES["llava_v1"].with_tokens(tokenizer)


def test_templates_of_chats():
    assert list(chat_templates()) == CHAT
    assert chat_templates()["mistral_instruct_system"] == CHAT_TEMPLATE
    with pytest.raises(ValueError, match="template: expected one with the words of the user, got 'plain'"):
        chat_template("plain")


def test_a_template_without_a_place_for_a_system_prompt():
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    with pytest.raises(ValueError, match="sample 7: expected no system prompt for template 'plain', got 's'"):
        render("plain", turns, system="s", sample=7)
    assert render_text("plain", turns, system="") == "a\n"
    assert "s" in render_text("llava_v1", turns, system="s")
