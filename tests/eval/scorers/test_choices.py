# SPDX-License-Identifier: Apache-2.0
"""Scorers that look for the letter of an option: ScienceQA, SEED, MMBench, MMMU."""

from random import Random

import pytest

from cumo.eval.scorers import mmbench, mmmu, scienceqa, seed

OPTIONS = {"A": "red", "B": "dark blue", "C": "green", "D": "a yellow car"}


@pytest.mark.parametrize("text", ["B", "B. foo", "The answer is B.", "So: The answer is B, I think"])
def test_scienceqa_finds(text):
    assert scienceqa.choice_index(text, 4) == 1


@pytest.mark.parametrize(
    "text", ["B.", "The answer is B", "The answer is A. The answer is B.", "E", "b", "B\n", "", "AB", "AB. c"]
)
def test_scienceqa_does_not_find(text):
    assert scienceqa.choice_index(text, 4) == -1


def test_scienceqa_fifth_option():
    assert scienceqa.choice_index("E", 5) == 4
    assert scienceqa.parse("The answer is Z.") == "Z"
    assert scienceqa.choice_index("The answer is Z.", 5) == -1


def test_seed_is_strict():
    assert seed.is_correct("A", "A")
    assert not seed.is_correct("A.", "A")
    assert not seed.is_correct("a", "A")


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("**B**", "B"),
        ("The answer is B: dark blue.", "B"),
        ("It is dark blue", "B"),
        ("The answer is **C**, not A or B", "C"),
        ("A or B", None),
        ("I do not know", None),
        ("B comes first of all the letters here", None),
        ("red or green", None),
        ("It is red " + "indeed " * 20, None),
        ("Cannot determine the answer", "Z"),
        ("Z", "Z"),
        ("E", None),
    ],
)
def test_mmbench_rules(response, letter):
    assert mmbench.parse(response, OPTIONS) == letter


def test_mmbench_circular_evaluation():
    right = {3: True, 1_000_003: True, 2_000_003: False, 4: True, 1_000_004: True}
    assert mmbench.circular(right) == {3: False, 4: True}


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B.", "B"),
        ("(C)", "C"),
        ("The answer is B", "B"),
        ("A or B", "B"),
        ("(A) then (D)", "D"),
        ("(A), or rather B", "A"),
        ("The car is clearly a dark blue one", "B"),
        ("The car is not green but rather Dark Blue", "B"),
        ("b", "A"),
        ("", "A"),
        ("AB", "A"),
        ("dark blue", "A"),
    ],
)
def test_mmmu_choices(response, letter):
    """The last four name none: a fresh generator draws A."""
    assert mmmu.parse_choice(response, OPTIONS, Random(mmmu.PUBLISHED_SEED)) == letter


def test_mmmu_draws_only_where_nothing_is_found():
    random = Random(0)
    state = random.getstate()
    mmmu.parse_choice("(B)", OPTIONS, random)
    assert random.getstate() == state
    assert {mmmu.parse_choice("", OPTIONS, random) for _ in range(50)} == set(OPTIONS)


@pytest.mark.parametrize(
    ("response", "parsed"),
    [
        ("The answer is 1,234.567.", {1234.0, 1234.57, 234.57}),
        ("x = 5", {5.0}),
        ("so 12 apples\nThus final 7", {"12 apples", 12.0, 7.0}),
        ("It is about 3.50 metres", {3.5, "about 3.50 metres"}),
        ("a", {" a", "a "}),
        ("One. Two is Three", {"three"}),
    ],
)
def test_mmmu_open_answers(response, parsed):
    assert mmmu.parse_open(response) == parsed


@pytest.mark.parametrize(
    ("answers", "response", "correct"),
    [
        (["a"], "cat", False),
        (["0.5"], "50%", False),
        (["three", "3"], "about three", True),
        (["three", "3"], "it is 3.0", True),
        (["3"], "it is 3.004", True),
        (["cat"], "the cat", True),
    ],
)
def test_mmmu_open_evaluation(answers, response, correct):
    assert mmmu.is_open_correct(mmmu.parse_open(response), answers) is correct


def test_mmmu_accuracies():
    assert mmmu.accuracies({"Art": [True, False], "Math": [True, True]}) == {
        "overall": 75,
        "Art and Design": 50,
        "Science": 100,
        "Art": 50,
        "Math": 100,
    }
    assert len(mmmu.SUBJECTS) == 30
    for wrong in ({"Maths": [True]}, {"Art": []}, {}):
        with pytest.raises(ValueError, match="correct: expected answers in subjects of MMMU"):
            mmmu.accuracies(wrong)
