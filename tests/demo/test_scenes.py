# SPDX-License-Identifier: Apache-2.0
"""Scenes and questions: what is asked has the answer that the picture shows, and digits of the test are kept apart."""

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

from cumo.demo import scenes


@pytest.fixture(scope="module")
def digits():
    return scenes.load_digits(seed=0)


def test_digits_of_the_test_are_none_of_those_for_training(digits):
    seen = {drawing.tobytes() for drawings in digits.train for drawing in drawings}
    held_out = [drawing.tobytes() for drawings in digits.test for drawing in drawings]
    assert len(seen) + len(held_out) > 1700
    assert len(held_out) > 400
    assert not seen & set(held_out)


def test_the_choice_of_held_out_digits_follows_the_seed(digits):
    same, other = scenes.load_digits(seed=0), scenes.load_digits(seed=1)
    assert all(np.array_equal(one, two) for one, two in zip(digits.test, same.test, strict=True))
    assert not all(np.array_equal(one, two) for one, two in zip(digits.test, other.test, strict=True))


def test_digits_of_a_scene_differ_in_value_and_place():
    rng = np.random.default_rng(0)
    counts = set()
    for _ in range(200):
        scene = scenes.random_scene(rng, most=3)
        counts.add(len(scene.items))
        assert len({item.digit for item in scene.items}) == len(scene.items)
        places = [scenes.PLACES.index(item.place) for item in scene.items]
        assert places == sorted(set(places))
    assert counts == {1, 2, 3}


@pytest.mark.parametrize("place", scenes.PLACES)
def test_a_digit_is_drawn_at_its_place_on_its_ground(place, digits):
    rng = np.random.default_rng(0)
    scene = scenes.Scene("blue", (scenes.Item(8, place),))
    picture = scenes.draw(scene, digits.train, rng).astype(float)
    assert picture.shape == (scenes.SIZE, scenes.SIZE, 3)
    cells = picture.reshape(2, scenes.CELL, 2, scenes.CELL, 3).transpose(0, 2, 1, 3, 4).reshape(4, -1, 3)
    brightest = cells.min(axis=2).max(axis=1)  # white ink is bright in every channel
    assert brightest.argmax() == scenes.PLACES.index(place)
    assert brightest.max() > 180
    assert np.delete(brightest, brightest.argmax()).max() < 100
    empty = np.delete(cells, brightest.argmax(), axis=0).mean(axis=(0, 1))
    nearest = min(scenes.COLOURS, key=lambda name: np.abs(empty - scenes.COLOURS[name]).sum())
    assert nearest == "blue"


def test_pictures_follow_the_seed(digits):
    scene = scenes.Scene("red", (scenes.Item(3, "top left"), scenes.Item(7, "bottom right")))
    first, again, other = (scenes.draw(scene, digits.train, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_answers_are_what_the_scene_shows():
    scene = scenes.Scene("green", (scenes.Item(4, "top right"), scenes.Item(9, "bottom left")))
    assert {(one.text, one.answer) for one in scenes.questions(scene)} == {
        ("Which digit is at the top right?", "4"),
        ("Which digit is at the bottom left?", "9"),
        ("How many digits are there?", "two"),
        ("Which colour is the ground?", "green"),
    }
    assert scenes.caption(scene) == "green ground, 4 at the top right, 9 at the bottom left"


def test_where_is_asked_of_single_digits():
    scene = scenes.Scene("black", (scenes.Item(0, "bottom right"),))
    rng = np.random.default_rng(0)
    assert [one[1:] for one in scenes.one_of_each_kind(scene, rng)] == [
        ("Which digit is at the bottom right?", "0"),
        ("Where is the 0?", "bottom right"),
        ("How many digits are there?", "one"),
        ("Which colour is the ground?", "black"),
    ]


def test_one_question_of_each_kind_is_drawn_from_all():
    scene = scenes.Scene("green", (scenes.Item(4, "top right"), scenes.Item(9, "bottom left")))
    rng = np.random.default_rng(0)
    drawn = [scenes.one_of_each_kind(scene, rng) for _ in range(30)]
    assert {one for row in drawn for one in row} == set(scenes.questions(scene))
    assert all([one.kind for one in row] == ["which", "how many", "ground"] for row in drawn)
