# SPDX-License-Identifier: Apache-2.0
"""Scenes of handwritten digits on coloured ground, and what can be asked about them.

The digits are those of scikit-learn (Alpaydin and Kaynak, UCI), 8 x 8 pixels of 17 grey levels, which its package
holds. All else follows from the generator of random numbers that a caller hands over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator
from PIL import Image

SIZE = 32  # pixels of a picture's side
CELL = SIZE // 2  # pixels of the side of each of its four places
PLACES = ("top left", "top right", "bottom left", "bottom right")
COLOURS = {
    "red": (196, 48, 43),
    "green": (34, 131, 62),
    "blue": (38, 84, 192),
    "purple": (132, 52, 158),
    "black": (38, 38, 42),
}
NUMBERS = ("zero", "one", "two", "three", "four")
KINDS = ("which", "where", "how many", "ground")
SHARE_FOR_TESTS = 0.25

Array = np.ndarray[Any, Any]


class Digits(NamedTuple):
    """Handwritten digits; no training sees those for tests."""

    train: tuple[Array, ...]
    """Drawings of each of the ten digits, float32 [n, 8, 8] in 0..1."""
    test: tuple[Array, ...]


class Item(NamedTuple):
    """A digit of a scene."""

    digit: int
    place: str
    """One of `PLACES`."""


class Scene(NamedTuple):
    """The contents of a picture."""

    ground: str
    """Its colour, a key of `COLOURS`."""
    items: tuple[Item, ...]
    """Digits with their places, in the order of `PLACES`; no two share a digit or a place."""


class Question(NamedTuple):
    """Something to ask about a scene."""

    kind: str
    """One of `KINDS`."""
    text: str
    answer: str


def load_digits(seed: int) -> Digits:
    """The digits of scikit-learn, of each of the ten a random quarter set apart for tests."""
    from sklearn import datasets  # type: ignore[import-untyped]

    data = datasets.load_digits()
    drawings = data.images.astype(np.float32) / 16
    rng = np.random.default_rng(seed)
    train, test = [], []
    for digit in range(10):
        rows = rng.permutation(np.flatnonzero(data.target == digit))
        held_out = round(len(rows) * SHARE_FOR_TESTS)
        train.append(drawings[rows[held_out:]])
        test.append(drawings[rows[:held_out]])
    return Digits(tuple(train), tuple(test))


def draw_ground(colour: str, rng: Generator) -> Array:
    """A picture without digits, uint8 [SIZE, SIZE, 3]: a colour of slightly varying shade, with grain."""
    shade = np.array(COLOURS[colour]) * rng.uniform(0.8, 1.15)
    return np.clip(shade + rng.normal(0, 4, (SIZE, SIZE, 1)), 0, 255).astype(np.uint8)


def write_digit(picture: Array, drawing: Array, top: int, left: int, size: int, rng: Generator) -> None:
    """Write a digit into a picture, size x size pixels, in white ink of slightly varying strength."""
    resized = Image.fromarray((drawing * 255).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    cover = np.asarray(resized)[..., None] / 255 * rng.uniform(0.85, 1.0)
    ground = picture[top : top + size, left : left + size]
    picture[top : top + size, left : left + size] = (ground * (1 - cover) + 255 * cover).astype(np.uint8)


def draw(scene: Scene, drawings: Sequence[Array], rng: Generator) -> Array:
    """The picture of a scene, uint8 [SIZE, SIZE, 3]: each digit somewhere within its place.

    Args:
        scene: what to show.
        drawings: of each of the ten digits, as in `Digits`; a random one is taken.
        rng: of drawings, sizes, shifts and shades.
    """
    picture = draw_ground(scene.ground, rng)
    for item in scene.items:
        drawing = drawings[item.digit][rng.integers(len(drawings[item.digit]))]
        size = int(rng.integers(CELL - 3, CELL + 1))
        corner = np.array(divmod(PLACES.index(item.place), 2)) * CELL
        top, left = corner + rng.integers(0, CELL - size + 1, size=2)
        write_digit(picture, drawing, int(top), int(left), size, rng)
    return picture


def draw_close_up(ground: str, digit: int, drawings: Sequence[Array], rng: Generator) -> Array:
    """A picture that a single digit fills, as a tile of a scene at a larger scale looks."""
    picture = draw_ground(ground, rng)
    size = int(rng.integers(SIZE - 6, SIZE + 1))
    top, left = rng.integers(0, SIZE - size + 1, size=2)
    write_digit(picture, drawings[digit][rng.integers(len(drawings[digit]))], int(top), int(left), size, rng)
    return picture


def random_scene(rng: Generator, most: int) -> Scene:
    """One to `most` different digits at different places."""
    count = int(rng.integers(1, most + 1))
    digits = rng.choice(10, count, replace=False)
    places = sorted(rng.choice(len(PLACES), count, replace=False))
    items = [Item(int(digit), PLACES[place]) for digit, place in zip(digits, places, strict=True)]
    return Scene(str(rng.choice(list(COLOURS))), tuple(items))


def facts(scene: Scene) -> list[str]:
    """Describe a scene in separate phrases."""
    return [f"{scene.ground} ground", *(f"{item.digit} at the {item.place}" for item in scene.items)]


def caption(scene: Scene) -> str:
    """Describe a scene in a sentence."""
    return ", ".join(facts(scene))


def questions(scene: Scene) -> list[Question]:
    """All that can be asked about a scene."""
    items = scene.items
    # Of two digits, small models take thousands of steps to tell whose place is asked.
    alone = items if len(items) == 1 else ()
    return [
        *(Question("which", f"Which digit is at the {item.place}?", str(item.digit)) for item in items),
        *(Question("where", f"Where is the {item.digit}?", item.place) for item in alone),
        Question("how many", "How many digits are there?", NUMBERS[len(items)]),
        Question("ground", "Which colour is the ground?", scene.ground),
    ]


def one_of_each_kind(scene: Scene, rng: Generator) -> list[Question]:
    """Choose one of `questions` of each kind that there is, in the order of `KINDS`."""
    by_kind = [[one for one in questions(scene) if one.kind == kind] for kind in KINDS]
    return [asked[rng.integers(len(asked))] for asked in by_kind if asked]
