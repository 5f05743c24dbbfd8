# SPDX-License-Identifier: Apache-2.0
"""Pieces of text add up to the whole, whatever the tokens; stop strings across tokens; draws by probability."""

import random

import pytest
import torch

from cumo.inference.rows import choose
from cumo.inference.text_stream import TextStream

TEXTS = [
    "Hello world, this is  a   test.",
    "naïve café, Ünïcödé, 画像に何が写っていますか？",
    "🐱 and 👩‍👩‍👧, tabs\tand\n\nlines\n  indented",
    "def f(x):\n    return x  # 1234567.89",
]


@pytest.fixture(scope="module")
def tokenizer(pipeline):
    return pipeline.processor.tokenizer


def streamed(tokenizer, ids, stop=()):
    stream = TextStream(tokenizer, stop)
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text
    assert all("\ufffd" not in piece for piece in pieces)
    return pieces, stream


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_pieces_are_the_text(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces, stream = streamed(tokenizer, ids)
    assert stream.text == text.strip() == tokenizer.decode(ids).strip()
    assert sum(map(bool, pieces)) > 3


def test_random_tokens(tokenizer):
    draw = random.Random(0)
    for _ in range(50):
        ids = [draw.randrange(259, 32000) for _ in range(30)]  # no lone bytes
        _, stream = streamed(tokenizer, ids)
        assert stream.text == tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_white_space_around_the_text_is_left_out(tokenizer):
    ids = tokenizer("\n  a b \n ", add_special_tokens=False)["input_ids"]
    pieces, stream = streamed(tokenizer, [*ids, tokenizer.eos_token_id])
    assert stream.text == "a b"
    assert [piece for piece in pieces if piece][0] == "a"


@pytest.mark.parametrize("stop", ["world", " wor", "is is", ", t", ".", "is  a", "o", "rld, th"])
def test_stop_strings_across_tokens(tokenizer, stop):
    text = TEXTS[0]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    expected = text[: text.index(stop)].rstrip() if stop in text else text
    pieces, stream = streamed(tokenizer, ids, ["xyz", stop])
    assert stream.text == expected
    assert stream.stopped == (stop in text)


def test_the_earliest_stop_string_counts(tokenizer):
    ids = tokenizer("alpha beta gamma", add_special_tokens=False)["input_ids"]
    assert streamed(tokenizer, ids, ["gamma", "beta", "beta gamma"])[1].text == "alpha"


def test_what_may_become_a_stop_string_is_held_back(tokenizer):
    ids = tokenizer("one two three", add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer, ["two four"])
    given = [stream.push(token) for token in ids[:-1]]
    assert "".join(given) == "one"
    assert stream.push(ids[-1]) == " two three"


def test_draws_follow_the_probabilities():
    torch.manual_seed(0)
    probs = torch.tensor([0.05, 0.5, 0.15, 0.3])
    count = 20_000
    logits = probs.log().expand(count, -1)
    draw = torch.rand(count, 1)
    for top_p, kept in ((1.0, [0, 1, 2, 3]), (0.8, [1, 3]), (0.81, [1, 2, 3]), (0.5, [1]), (1e-6, [1])):
        chosen = choose(logits, torch.full((count, 1), top_p), draw).flatten()
        expected = torch.zeros(4)
        expected[kept] = probs[kept] / probs[kept].sum()
        actual = torch.bincount(chosen, minlength=4) / count
        torch.testing.assert_close(actual, expected, rtol=0, atol=0.015)
        assert bool((actual[expected == 0] == 0).all())


def test_the_ends_of_the_distribution():
    logits = torch.tensor([[0.0, 1.0, -torch.inf]]).expand(2, -1)
    draw = torch.tensor([[0.0], [1.0 - 2**-24]])
    assert choose(logits, torch.ones(2, 1), draw).flatten().tolist() == [1, 0]
