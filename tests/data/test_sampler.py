# SPDX-License-Identifier: Apache-2.0
"""The order of samples: one modality and similar lengths in a batch, the same everywhere, each index once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cumo.data import ModalityLengthSampler


@given(
    st.lists(st.tuples(st.integers(1, 1000), st.booleans()), max_size=60),
    st.integers(1, 9),
    st.integers(0, 5),
    st.integers(0, 5),
)
def test_a_permutation_of_batches_of_one_modality(samples, batch_size, seed, epoch):
    lengths, has_image = [length for length, _ in samples], [image for _, image in samples]
    order = list(ModalityLengthSampler(lengths, has_image, batch_size, seed=seed, epoch=epoch))
    assert sorted(order) == list(range(len(samples)))
    whole = sum(has_image) // batch_size + (len(samples) - sum(has_image)) // batch_size
    for number in range(whole):
        batch = order[number * batch_size : (number + 1) * batch_size]
        assert len({has_image[index] for index in batch}) == 1
    left = [has_image[index] for index in order[whole * batch_size :]]
    assert left == sorted(left, reverse=True)


def made_up(count=4000):
    rng = np.random.default_rng(0)
    return rng.integers(10, 2000, count).tolist(), (rng.random(count) < 0.7).tolist()


def test_lengths_within_a_batch_are_similar():
    lengths, has_image = made_up()
    order = list(ModalityLengthSampler(lengths, has_image, 16))
    spread = [np.ptp([lengths[index] for index in order[begin : begin + 16]]) for begin in range(0, 3900, 16)]
    assert np.mean(spread) < 0.05 * 2000
    means = [np.mean([lengths[index] for index in order[begin : begin + 16]]) for begin in range(0, 3900, 16)]
    assert abs(np.corrcoef(means[1:-1], range(len(means) - 2))[0, 1]) < 0.2, "batches are sorted by length"


def test_the_longest_batch_with_pictures_comes_first():
    lengths, has_image = made_up()
    order = list(ModalityLengthSampler(lengths, has_image, 16, seed=3))
    assert all(has_image[index] for index in order[:16])
    sums = [
        sum(lengths[index] for index in order[begin : begin + 16])
        for begin in range(0, 3900, 16)
        if has_image[order[begin]]
    ]
    assert sums[0] == max(sums)


def test_the_order_depends_on_seed_and_epoch_alone():
    lengths, has_image = made_up(500)
    orders = {}
    for seed in (0, 1):
        for epoch in (0, 1):
            sampler = ModalityLengthSampler(lengths, has_image, 8, seed=seed, epoch=epoch)
            orders[seed, epoch] = list(sampler)
            assert list(sampler) == orders[seed, epoch]
    assert len({tuple(order) for order in orders.values()}) == 4
    sampler = ModalityLengthSampler(lengths, has_image, 8)
    sampler.set_epoch(1)
    assert list(sampler) == orders[0, 1] and len(sampler) == 500


def test_bad_arguments():
    with pytest.raises(ValueError, match="has_image: expected 2, as many as lengths, got 1"):
        ModalityLengthSampler([1, 2], [True], 1)
    with pytest.raises(ValueError, match="batch_size: expected a positive integer, got 0"):
        ModalityLengthSampler([1], [True], 0)
