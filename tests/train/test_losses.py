# SPDX-License-Identifier: Apache-2.0
"""Shares of a step's loss, its sum, and what is said when it is no number."""

from types import SimpleNamespace

import pytest
import torch

from cumo.nn.losses import AuxLosses
from cumo.train.losses import PARTS, Counts, NonFiniteError, check_finite, contributions, count, count_step, weighted
from tests.models.tiny import tiny_config


def batch(labels, mask=None, images=0):
    """A batch of the collator."""
    made = {"labels": torch.tensor(labels), "pixel_values": torch.zeros(images, 3, 2, 2)}
    if not images:
        del made["pixel_values"]
    return made if mask is None else {**made, "attention_mask": torch.tensor(mask)}


def numbers(counts):
    return [int(value) for value in counts]


def test_counts():
    first = batch([[5, -100, 7, 8], [-100, 3, -100, -100]], [[1, 1, 1, 1], [1, 1, 0, 0]], images=3)
    assert numbers(count(first)) == [3, 3, 8, 6], "the first label of a row is predicted by nothing"
    packed = batch([[-100, 7, 8, 9, -100]])
    assert numbers(count(packed)) == [3, 0, 5, 5]
    assert numbers(count_step([first, packed], torch.device("cpu"))) == [6, 3, 13, 11]


def test_contributions_add_up_to_the_means():
    counts = [Counts(*map(torch.tensor, row)) for row in ((2, 1, 10, 9), (6, 3, 30, 20))]
    step = Counts(*map(sum, zip(*counts, strict=True)))
    losses = [AuxLosses(torch.tensor(1.0), torch.tensor(2.0)), AuxLosses(torch.tensor(5.0), torch.tensor(10.0))]
    total = dict.fromkeys(PARTS, 0.0)
    for number, mine in enumerate(counts):
        output = {
            "lm_loss": torch.tensor([4.0, 8.0][number]),
            "vision_losses": losses[number],
            "connector_losses": losses[number],
            "text_losses": losses[number],
        }
        for name, part in contributions(output, mine, step).items():
            total[name] += float(part)
    assert total == {"lm_loss": 7.0} | {
        f"{module}_{kind}": value for module in ("vision", "connector", "text") for kind, value in
        (("balance", 4.0), ("z", 8.0))
    }  # fmt: skip
    config = tiny_config(text_type="mixtral")
    assert weighted(total, config) == pytest.approx(7 + 3 * (0.4 + 0.08))
    other = tiny_config(text_type="qwen2_moe", text={"router_aux_loss_coef": 0.5})
    assert weighted(total, other) == pytest.approx(7 + 2 * (0.4 + 0.08) + 0.5 * 4)


def test_a_pass_without_pictures_contributes_no_loss_of_the_encoder():
    nothing = Counts(*map(torch.tensor, (2, 0, 10, 9)))
    output = {"lm_loss": torch.tensor(4.0), "vision_losses": None, "connector_losses": None, "text_losses": None}
    assert contributions(output, nothing, nothing) == {"lm_loss": torch.tensor(4.0)}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_named(value):
    parts = {"lm_loss": torch.tensor(1.0), "vision_z": torch.tensor(value)}
    message = r"step 7: vision_z is .*(nan|inf), in the pass over a.json:3"
    with pytest.raises(NonFiniteError, match=message):
        check_finite(parts, 7, lambda: "a.json:3")
    check_finite({"lm_loss": torch.tensor(1.0)}, 7, lambda: pytest.fail("looked up in vain"))


def test_large_losses_are_numbers():
    check_finite({"lm_loss": torch.tensor(3e38)}, 1, SimpleNamespace)
