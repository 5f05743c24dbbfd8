# SPDX-License-Identifier: Apache-2.0
"""Scorers that compare words: TextVQA and VQAv2, GQA."""

import pytest

from cumo.eval.scorers import gqa, textvqa, vqa, vqav2

PEOPLE = ["london"] * 10


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("Two Dogs.", "2 dogs"),
        ("The cat", "cat"),
        ("dont", "don't"),
        ("10,000", "10000"),
        ("1,000.50", "1000.50"),
        ("3.5", "3.5"),
        ("a b c", "b c"),
        ("U.S.A.", "usa"),
        ("yes, it is", "yes it is"),
        ("what?s", "what's"),
        ("it's 5 o'clock", "it 's 5 o'clock"),
        ("ten", "10"),
        ("north-east", "north east"),
        ("a/b", "b"),
        ("50%", "50%"),
        ("$5.00", "$5.00"),
        ("hello!\nworld", "hello world"),
        ("  The  A an  ", ""),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("e.g. x", "eg x"),
        ("north-east - west", "northeast west"),
        ("a." * 40, "a" * 33 + ".a" * 7 + "."),
    ],
)
def test_normalised_answer(text, normalised):
    assert vqa.normalize_answer(text) == normalised


@pytest.mark.parametrize(("people", "score"), [(10, 1.0), (4, 1.0), (3, 0.9), (2, 0.6), (1, 0.3), (0, 0.0)])
def test_soft_accuracy_by_number_of_people_who_agree(people, score):
    assert vqa.soft_accuracy("Paris.", ["paris"] * people + PEOPLE[people:]) == pytest.approx(score)


@pytest.mark.parametrize("number", [0, 9, 11])
def test_answers_of_ten_people(number):
    with pytest.raises(ValueError, match=f"answers: expected 10, got {number}"):
        vqa.soft_accuracy("paris", ["paris"] * number)


@pytest.mark.parametrize(
    "prompt",
    [
        "What Is it?\nReference OCR token: a, b\nAnswer.",
        "Reference OCR token: a, b\nWhat is it?\nAnswer.",
        "What is it?\nAnswer.",
        "OCR tokens: a, b. Question: What is it? Short answer:",
    ],
    ids=["published", "tokens-first", "no-tokens", "m4c"],
)
def test_question_within_a_textvqa_prompt(prompt):
    assert textvqa.question_of(prompt) == "what is it?"


@pytest.mark.parametrize("prompt", ["What is it?", "a\nb\nc", "OCR tokens: a", "a\nReference OCR token: b\nc\nd"])
def test_no_question_within_a_prompt(prompt):
    with pytest.raises(ValueError, match="prompt: expected a published form"):
        textvqa.question_of(prompt)


def test_textvqa_accuracy_is_the_mean():
    pairs = [("paris", ["paris"] * 2 + PEOPLE[2:]), ("london", PEOPLE)]
    assert textvqa.accuracy(pairs) == pytest.approx(80)
    with pytest.raises(ValueError, match="pairs: expected at least one"):
        textvqa.accuracy([])


def test_vqav2_upload_covers_the_test_split():
    upload = vqav2.submission({7: "The two Dogs."}, [5, 7])
    assert upload == [{"question_id": 5, "answer": ""}, {"question_id": 7, "answer": "2 dogs"}]
    with pytest.raises(ValueError, match="got question_id 9"):
        vqav2.submission({9: "x"}, [5, 7])


@pytest.mark.parametrize(
    ("text", "correct"), [("Left.", True), ("left", True), ("left..", True), ("on the left", False), ("left. ", False)]
)
def test_gqa_exact_match(text, correct):
    assert gqa.is_correct(text, "left") is correct
