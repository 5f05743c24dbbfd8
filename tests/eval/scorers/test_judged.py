# SPDX-License-Identifier: Apache-2.0
"""Scorers that need a judge, or may: MathVista, MM-Vet, LLaVA-Bench."""

import math

import pytest

from cumo.eval.scorers import llava_wild, mathvista, mmvet
from cumo.eval.scorers.mathvista import Problem

CHOICE = Problem("multi_choice", "text", ("cat", "dog"), None, "dog")


@pytest.mark.parametrize(
    ("first", "second", "distance"), [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("dgo", "dog", 2)]
)
def test_edit_distance(first, second, distance):
    assert mathvista.edit_distance(first, second) == mathvista.edit_distance(second, first) == distance


@pytest.mark.parametrize(
    ("extraction", "normalised"),
    [("(B)", "dog"), ("B", "dog"), (" B ", "dog"), ("dgo", "dog"), ("(a) cat", "cat"), ("C", "cat"), ("", "cat")],
)
def test_mathvista_choices(extraction, normalised):
    assert mathvista.normalize(extraction, CHOICE) == normalised


@pytest.mark.parametrize(
    ("extraction", "answer_type", "precision", "normalised"),
    [
        ("3.0", "integer", None, "3"),
        ("abc", "integer", None, None),
        ("inf", "integer", None, None),
        ("1.256", "float", 2, "1.26"),
        ("1.256", "float", 2.0, "1.26"),
        ("1.2.3", "float", 2, None),
        ([1, 2], "list", None, "[1, 2]"),
        ("left", "text", None, "left"),
    ],
)
def test_mathvista_free_forms(extraction, answer_type, precision, normalised):
    assert mathvista.normalize(extraction, Problem("free_form", answer_type, precision=precision)) == normalised


def test_mathvista_published_rounding_fails_on_a_precision_that_is_a_float():
    for precision, normalised in ((2, "1.26"), (2.0, None)):
        problem = Problem("free_form", "float", precision=precision, answer="1.26")
        assert mathvista.normalize("1.256", problem, published_quirks=True) == normalised
        assert mathvista.is_correct("1.256", problem)


def test_mathvista_problems_that_lack_something():
    with pytest.raises(ValueError, match="choices: expected some"):
        mathvista.normalize("A", Problem("multi_choice", "text"))
    with pytest.raises(ValueError, match="precision: expected a number"):
        mathvista.normalize("1", Problem("free_form", "float"))


@pytest.mark.parametrize(
    ("response", "problem", "extraction"),
    [
        ("", CHOICE, ""),
        ("dog", CHOICE, "dog"),
        ("It is the dog", CHOICE, None),
        ("14", Problem("free_form", "integer"), "14"),
        ("14.0", Problem("free_form", "integer"), None),
        ("2", Problem("free_form", "float", precision=1), "2.0"),
        ("[1, 2]", Problem("free_form", "list"), None),
    ],
)
def test_mathvista_extraction_by_rule(response, problem, extraction):
    assert mathvista.extract_by_rule(response, problem) == extraction


def test_mathvista_quick_extraction():
    response = 'So. The answer is "14".'
    assert mathvista.extract_by_rule(response, CHOICE) is None
    assert mathvista.extract_by_rule(response, CHOICE, quick=True) == "14"


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("0.5", 0.5),
        ("1.0", 1),
        ("1", 1),
        ("0", 0),
        (" 0.3 \n", 0.3),
        ("0.7 because", 0.7),
        ("0.7, because", 0.7),
        ("1.5", None),
        ("-1", None),
        ("10", None),
        ("0.5.1", None),
        ("score: 1", None),
        ("nan", None),
        ("", None),
    ],
)
def test_mmvet_replies(reply, score):
    assert mmvet.parse_score(reply) == score


def test_mmvet_row_of_the_table():
    row = mmvet.judge_row("What?\nSay it.", "a<AND>b<OR>c", "b")
    assert row == "\nWhat?<br>Say it. | a <AND> b <OR> c | b | "


def test_mmvet_scores_by_capability():
    assert mmvet.by_capability([(1.0, ["ocr", "math"]), (0.5, ["ocr"])]) == {"total": 75, "ocr": 75, "math": 100}
    with pytest.raises(ValueError, match="scores: expected at least one"):
        mmvet.by_capability([])


@pytest.mark.parametrize(
    ("reply", "scores", "published"),
    [
        ("8 9\nBecause", (8, 9), (8, 9)),
        ("8,9", (8, 9), (8, 9)),
        ("8, 9", (8, 9), (-1, -1)),
        ("8 9 ", (8, 9), (-1, -1)),
        ("8.5 / 7", (8.5, 7), (-1, -1)),
        ("\n8 9", None, (-1, -1)),
        ("8", None, (-1, -1)),
        ("eight nine", None, (-1, -1)),
        ("8 9 10", None, (-1, -1)),
    ],
)
def test_llava_bench_replies(reply, scores, published):
    assert llava_wild.parse_scores(reply) == scores
    assert llava_wild.parse_scores(reply, published_quirks=True) == published


def test_llava_bench_score():
    assert math.isclose(llava_wild.relative_score([(8, 4), (10, 5), (2, 1)]), 50)
    for pairs in ([], [(0, 5)]):
        with pytest.raises(ValueError, match="pairs: expected scores of the reference"):
            llava_wild.relative_score(pairs)


def test_llava_bench_prompt():
    prompt = llava_wild.judge_prompt("A cat.", "What?", "cat", "dog", role="Assistant", rule="Rate.")
    assert prompt == (
        "[Context]\nA cat.\n\n[Question]\nWhat?\n\n[Assistant 1]\ncat\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\ndog\n\n[End of Assistant 2]\n\n[System]\nRate.\n\n"
    )
