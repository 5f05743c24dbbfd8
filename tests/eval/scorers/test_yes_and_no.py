# SPDX-License-Identifier: Apache-2.0
"""Scorers of yes-or-no questions: POPE and MME."""

import pytest

from cumo.eval.scorers import mme, pope


@pytest.mark.parametrize("text", ["No", "no.", "There is not a cat", "No, there is no dog.", "no, Yes"])
def test_pope_hears_no(text):
    assert not pope.says_yes(text)


@pytest.mark.parametrize(
    "text", ["Yes, there is.", "NO", "There isn't any", "None", "Nothing. No", "No\nreason", "", "Yes. No"]
)
def test_pope_hears_yes(text):
    assert pope.says_yes(text)


def test_pope_measures():
    counts = pope.count(["Yes", "Yes", "No", "No", "Yes"], ["yes", "no", "no", "yes", "yes"])
    assert counts == pope.Counts(true_positive=2, false_positive=1, true_negative=1, false_negative=1)
    assert counts.accuracy == pytest.approx(3 / 5)
    assert counts.precision == counts.recall == counts.f1 == pytest.approx(2 / 3)
    assert counts.yes_ratio == pytest.approx(3 / 5)


def test_pope_measures_of_a_model_that_never_says_yes():
    counts = pope.count(["No", "No"], ["yes", "no"])
    assert (counts.precision, counts.recall, counts.f1, counts.accuracy) == (0, 0, 0, 0.5)
    assert pope.count(["No"], ["no"]).recall == 0


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        (["yes"], ["yes", "no"], "predictions: expected one for each of 2 labels, got 1"),
        (["yes", "no"], ["yes"], "predictions: expected one for each of 1 labels, got 2"),
        ([], [], "predictions: expected one for each of 0"),
        (["yes"], ["Yes"], "labels: expected yes or no, got 'Yes' as label 0"),
    ],
)
def test_pope_rejects(predictions, labels, message):
    with pytest.raises(ValueError, match=message):
        pope.count(predictions, labels)


@pytest.mark.parametrize(
    ("text", "word"),
    [("Yes", "yes"), ("NO.", "no"), ("  no", "no"), ("It is yes", "other"), ("nope", "no"), ("", "other")],
)
def test_mme_reads_four_characters(text, word):
    assert mme.parse(text) == word


@pytest.mark.parametrize(
    ("first", "second", "score"), [("yes", "no", 200), ("yes", "yes", 50), ("no", "yes", 0), ("?", "no", 50)]
)
def test_mme_score_of_one_picture(first, second, score):
    assert mme.task_score([("a.png", first, "Yes"), ("a.png", second, "No")]) == score


def test_mme_score_of_two_pictures():
    rows = [("a", "yes", "Yes"), ("b", "yes", "Yes"), ("a", "no", "No"), ("b", "yes", "No")]
    assert mme.task_score(rows) == 75 + 50


@pytest.mark.parametrize("rows", [[("a", "yes", "Yes")], [("a", "yes", "Yes")] * 3, []])
def test_mme_wants_two_questions_on_each_picture(rows):
    with pytest.raises(ValueError, match="rows: expected"):
        mme.task_score(rows)


def test_mme_totals():
    scores = dict.fromkeys((*mme.PERCEPTION, *mme.COGNITION), 100.0)
    assert mme.totals(scores) == {"perception": 1000, "cognition": 400}
    with pytest.raises(ValueError, match=r"none of \['OCR'\] and the unknown \['ocr'\]"):
        mme.totals({("ocr" if name == "OCR" else name): score for name, score in scores.items()})
