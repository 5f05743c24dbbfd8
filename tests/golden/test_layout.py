# SPDX-License-Identifier: Apache-2.0
"""Whole checkpoints of the published layout: every expert is found, stacked and unstacked, bit by bit."""

import pytest

from cumo.checkpoints.layout import published_styles, stack_state_dict, stacked_styles, unstack_state_dict
from tests.golden.data import load_tensors
from tests.numerics import assert_bitwise_equal


@pytest.mark.parametrize("name", ["checkpoint_cumo_mistral", "checkpoint_cumo_mixtral"])
def test_round_trip(name):
    published, _ = load_tensors(f"{name}/model.safetensors")
    stacked = stack_state_dict(published)
    styles = {"connector", "clip", "mixtral"} if name.endswith("mixtral") else {"connector", "clip"}
    assert set(published_styles(published).values()) == styles
    assert stacked_styles(stacked) == published_styles(published)
    assert not [key for key in stacked if ".experts." in key]
    assert_bitwise_equal(unstack_state_dict(stacked), published)
