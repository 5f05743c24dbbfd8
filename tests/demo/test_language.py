# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of the demo and the texts it learns from."""

import numpy as np
import pytest

from cumo.demo import language, scenes
from cumo.models.tokenizer import IMAGE_TOKEN


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    return [language.random_text(rng, most=2) for _ in range(300)]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return language.train_tokenizer(texts, 400)


def test_the_placeholder_comes_behind_the_vocabulary(tokenizer):
    assert tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) == len(tokenizer) - 1
    assert [tokenizer.convert_tokens_to_ids(token) for token in language.SPECIAL] == [0, 1, 2, 3]
    assert tokenizer.eos_token_id != 2, "CLIP pools such texts at their largest id"


@pytest.mark.parametrize("text", ["Which digit is at the top left?", "ünseen wörds, 漢字 \t\n 12", ""])
def test_any_text_comes_back_as_it_was(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_digits_and_colours_are_a_token_each(tokenizer):
    for word in (*map(str, range(10)), *scenes.COLOURS):
        assert len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1, word


def test_texts_tell_a_scene_and_then_tell_it_again_or_ask(texts):
    again = [text for text in texts if not text.startswith("<s>[INST]")]
    asked = [text for text in texts if text.startswith("<s>[INST]")]
    assert min(len(again), len(asked)) > 100
    for text in again:
        told, caption, end = text.removeprefix("<s>").split("\n")
        assert sorted(told.split(", ")) == sorted(caption.split(", "))
        assert caption.split(", ")[0].endswith(" ground")
        assert end == ""
    for text in asked:
        answer = text.split("[/INST] ")[1].removesuffix(" </s>")
        assert answer in (*map(str, range(10)), *scenes.PLACES, *scenes.COLOURS, *scenes.NUMBERS)
        if "How many" not in text:
            assert answer in text.split("\n")[0]
