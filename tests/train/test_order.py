# SPDX-License-Identifier: Apache-2.0
"""One stream of whole batches over all epochs."""

import pytest

from cumo.data import ModalityLengthSampler
from cumo.train.order import Shuffle, Stream

LENGTHS, HAS_IMAGE = [(37 * index) % 50 + 1 for index in range(23)], [index % 3 > 0 for index in range(23)]


@pytest.fixture(params=["shuffle", "grouped"])
def epochs(request):
    return Shuffle(23, 5) if request.param == "shuffle" else ModalityLengthSampler(LENGTHS, HAS_IMAGE, 4, seed=5)


def test_every_epoch_has_every_sample_and_begins_with_a_whole_batch(epochs):
    stream = Stream(epochs, 4, 15)
    order = list(stream)
    assert stream.steps_per_epoch == 6 and len(order) == len(stream) == 60
    first, second, third = order[:24], order[24:48], order[48:]
    for epoch in (first, second):
        assert set(epoch) == set(range(23))
        assert epoch[23] == epoch[0], "the last batch is filled up from the beginning"
    assert first != second and third == [*third]
    assert len(set(third)) == 12
    assert list(stream) == order


def test_batches_stay_of_one_modality_in_every_epoch():
    order = list(Stream(ModalityLengthSampler(LENGTHS, HAS_IMAGE, 4, seed=5), 4, 12))
    for epoch in (order[:24], order[24:]):
        mixed = [len({HAS_IMAGE[index] for index in epoch[begin : begin + 4]}) > 1 for begin in range(0, 24, 4)]
        assert sum(mixed) <= 1, "of what is left over of both"


def test_fewer_samples_than_a_batch():
    order = list(Stream(Shuffle(3, 0), 8, 2))
    assert len(order) == 16
    assert all(set(order[begin : begin + 3]) == {0, 1, 2} for begin in (0, 3, 8, 11))


def test_the_order_depends_on_the_seed():
    assert list(Stream(Shuffle(9, 0), 3, 3)) != list(Stream(Shuffle(9, 1), 3, 3))
