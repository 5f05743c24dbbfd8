# SPDX-License-Identifier: Apache-2.0
"""What the published scorers return."""

import json
from random import Random

import pytest

from cumo.eval.scorers import mmmu, pope, scienceqa, vqa
from tests.golden.data import golden


@pytest.fixture(scope="module")
def published():
    return json.loads(golden("scorers.json").read_text(encoding="utf-8"))


def test_normalised_answers(published):
    assert published["vqa_normalize"]
    for case in published["vqa_normalize"]:
        assert vqa.normalize_answer(case["in"]) == case["out"]


def test_soft_accuracies(published):
    assert published["textvqa"]
    for case in published["textvqa"]:
        assert vqa.soft_accuracy(case["prediction"], case["answers"]) == pytest.approx(case["score"], abs=1e-12)


def test_pope(published):
    case = published["pope"]
    counts = pope.count(case["predictions"], case["labels"])
    for name in ("accuracy", "f1", "precision", "recall", "yes_ratio"):
        assert getattr(counts, name) == pytest.approx(case[name], abs=1e-12), name


def test_mmmu_choices(published):
    assert published["mmmu_choice"]
    random = Random(mmmu.PUBLISHED_SEED)
    for case in published["mmmu_choice"]:
        options = {letter: case["texts"][letter] for letter in case["choices"]}
        assert mmmu.parse_choice(case["response"], options, random) == case["parsed"], case["response"]


def test_mmmu_open_answers(published):
    assert published["mmmu_open"]
    for case in published["mmmu_open"]:
        parsed = mmmu.parse_open(case["response"])
        assert sorted(map(str, parsed)) == case["parsed"], case["response"]
        for answer, correct in case["correct_for"].items():
            assert mmmu.is_open_correct(parsed, [answer]) == correct, (case["response"], answer)


def test_scienceqa(published):
    assert published["scienceqa"]
    for case in published["scienceqa"]:
        assert scienceqa.parse(case["text"]) == case["parsed"], case["text"]
