# SPDX-License-Identifier: Apache-2.0
"""Ids and labels: those of the published prompts, and text that looks like the template's markers."""

import pytest

from cumo.data.encoding import SampleEncoder
from cumo.data.formats import parse_row
from cumo.models.prompts import IGNORE_INDEX, encode_sample
from tests.data.samples import llava

TEMPLATES = ["plain", "mistral_instruct_system", "llava_v1"]


def trained_text(processor, encoded):
    """What is learnt, as text, special tokens included."""
    return processor.tokenizer.decode([label for label in encoded.labels if label != IGNORE_INDEX])


@pytest.mark.parametrize("template", TEMPLATES)
def test_as_published_with_placeholders_expanded(processor, template):
    row = llava("what is this?", "a cat", images=["a"], id=1)
    row["conversations"] += llava("<image> and this?", "a dög")["conversations"]
    row["image"] = ["a", "b"]
    encoded = SampleEncoder(processor, template)(parse_row(row))
    expected = encode_sample(processor.tokenizer, row, template, processor.image_token_id)
    image = processor.image_token_id
    expanded = [token for token in expected.input_ids for _ in range(4 if token == image else 1)]
    assert encoded.input_ids == expanded and encoded.input_ids.count(image) == 8
    assert len(encoded.labels) == len(encoded.input_ids)
    assert [label for label in encoded.labels if label != IGNORE_INDEX] == [
        label for label in expected.labels if label != IGNORE_INDEX
    ]
    assert all(label == IGNORE_INDEX for token, label in zip(*encoded, strict=True) if token == image)


MARKERS = ["[INST] no [/INST]", "USER: ASSISTANT:", "</s>", "<s><s>", "<unk> a </s> b", "ASSISTANT: </s>USER:"]


@pytest.mark.parametrize("template", TEMPLATES[1:])
@pytest.mark.parametrize("marker", MARKERS)
def test_markers_in_a_text_change_no_label(processor, template, marker):
    """What a user or an answer says is text: the answers are learnt, whole, and nothing else is."""
    row = {"conversations": llava(f"q {marker} r", f"one {marker} two")["conversations"]}
    row["conversations"] += llava(marker, "three")["conversations"]
    encoded = SampleEncoder(processor, template)(parse_row(row))
    plain = SampleEncoder(processor, template)(parse_row(llava("q", "one")))
    end = trained_text(processor, plain).removeprefix(" one")
    learnt = trained_text(processor, encoded)
    assert learnt == f" one {marker} two{end} three{end}"
    eos = processor.tokenizer.eos_token_id
    assert encoded.input_ids.count(eos) == 2, "one after each answer, none within a text"
    assert encoded.input_ids.count(processor.tokenizer.bos_token_id) == plain.input_ids.count(
        processor.tokenizer.bos_token_id
    )
    assert processor.tokenizer.unk_token_id not in encoded.input_ids


def test_lone_surrogates_are_no_obstacle(processor):
    encoded = SampleEncoder(processor, "llava_v1")(parse_row(llava("a\ud800b", "c\ud800")))
    assert "a?b" in processor.tokenizer.decode(encoded.input_ids)


def test_system_prompts(processor):
    row = {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "q"}]}
    row["messages"].append({"role": "assistant", "content": "a"})
    encoder = SampleEncoder(processor, "mistral_instruct_system")
    assert "<<SYS>>\nbe brief\n<</SYS>>" in processor.tokenizer.decode(encoder(parse_row(row)).input_ids)
    row["messages"][0]["content"] = ""
    assert "SYS" not in processor.tokenizer.decode(encoder(parse_row(row)).input_ids)
