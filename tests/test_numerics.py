# SPDX-License-Identifier: Apache-2.0
"""The measures of `tests.numerics` see what they are there to see."""

import math

import pytest
import torch

from tests.numerics import assert_as_exact_as_eager, assert_bitwise_equal, relative_error, worst_coordinate


def test_error_is_relative_to_the_norm():
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(exact + torch.tensor([0.0, 0.5]), exact) == pytest.approx(0.1)
    assert relative_error(1e-20 * exact, 2e-20 * exact) == pytest.approx(0.5)
    assert relative_error(exact + torch.tensor([0.0, 0.5]), exact, math.inf) == pytest.approx(0.125)


@pytest.mark.parametrize(
    ("actual", "exact", "error"),
    [
        pytest.param([], [], 0.0, id="nothing"),
        pytest.param([0.0], [0.0], 0.0, id="zeros"),
        pytest.param([1e-30], [0.0], math.inf, id="something-for-zero"),
        pytest.param([math.nan, 1.0], [math.nan, 1.0], 0.0, id="nan-for-nan"),
        pytest.param([math.inf, 1.0], [math.inf, 1.0], 0.0, id="inf-for-inf"),
        pytest.param([math.nan, 1.0], [0.0, 1.0], math.inf, id="nan-for-a-number"),
        pytest.param([0.0, 1.0], [math.nan, 1.0], math.inf, id="a-number-for-nan"),
        pytest.param([-math.inf], [math.inf], math.inf, id="wrong-sign-of-infinity"),
    ],
)
def test_error_of_what_has_no_norm(actual, exact, error):
    assert relative_error(torch.tensor(actual), torch.tensor(exact)) == error


def test_worst_coordinate_names_place_and_values():
    actual = torch.zeros(2, 3)
    actual[1, 2] = 0.5
    assert worst_coordinate(actual, torch.zeros(2, 3)) == "worst at (1, 2): got 0.5, expected 0"
    actual[0, 1] = math.nan
    assert worst_coordinate(actual, torch.zeros(2, 3)) == "worst at (0, 1): got nan, expected 0"


def compare(actual, eager, exact, **options):
    assert_as_exact_as_eager({"y": actual}, {"y": eager}, {"y": exact}, **options)


def test_twice_the_error_of_eager_and_one_unit_pass_and_more_fails():
    exact = torch.ones(100, dtype=torch.float64)
    eager = (exact * (1 + 1e-3)).float()
    eps = torch.finfo(torch.float32).eps
    compare((exact * (1 + 2e-3)).float(), eager, exact)
    compare(exact.float() * (1 + eps), exact.float(), exact)
    with pytest.raises(AssertionError, match=r"y: error 2.10e-03 > 2 \* 1.00e-03 \(eager\)"):
        compare((exact * (1 + 2.1e-3)).float(), eager, exact)
    with pytest.raises(AssertionError, match="y: error"):
        compare(exact.float() * (1 + 2 * eps), exact.float(), exact)


def test_one_wrong_element_among_many_fails():
    exact = torch.randn(100_000, dtype=torch.float64)
    actual = exact.bfloat16()
    actual[77_777] += 1.0
    with pytest.raises(AssertionError, match=r"in the inf-norm; worst at \(77777,\)"):
        compare(actual, exact.bfloat16(), exact)


def test_unit_is_that_of_the_coarser_dtype_on_the_way():
    exact = torch.ones(100, dtype=torch.float64)
    actual = exact.float() * (1 + torch.finfo(torch.bfloat16).eps)
    compare(actual, exact.float(), exact, rounded_to=torch.bfloat16)
    with pytest.raises(AssertionError):
        compare(actual, exact.float(), exact)


@pytest.mark.parametrize(
    ("actual", "complaint"),
    [
        pytest.param(torch.ones(3, dtype=torch.bfloat16), "bfloat16", id="dtype"),
        pytest.param(torch.ones(3, 1), r"\[3, 1\]", id="shape"),
        pytest.param(torch.tensor([1.0, math.nan, 1.0]), "got nan, expected 1", id="nan"),
    ],
)
def test_other_dtype_shape_or_nan_fails(actual, complaint):
    with pytest.raises(AssertionError, match=complaint):
        compare(actual, torch.ones(3), torch.ones(3, dtype=torch.float64))


def test_integers_must_be_equal():
    compare(torch.tensor([1, 2]), torch.tensor([1, 2]), torch.tensor([1, 2]))
    with pytest.raises(AssertionError, match="got 3, expected 2"):
        compare(torch.tensor([1, 3]), torch.tensor([1, 2]), torch.tensor([1, 2]))


def test_nothing_to_compare_fails():
    with pytest.raises(AssertionError, match="nothing to compare"):
        assert_as_exact_as_eager({}, {}, {})
    with pytest.raises(AssertionError, match="nothing to compare"):
        assert_bitwise_equal({}, {})


def test_bitwise_equality_is_of_every_bit():
    one = torch.ones(2)
    assert_bitwise_equal({"y": one / 0 * 0}, {"y": one / 0 * 0})
    with pytest.raises(AssertionError, match="y: worst at"):
        assert_bitwise_equal({"y": one + 2**-23}, {"y": one})
    with pytest.raises(AssertionError, match="float64"):
        assert_bitwise_equal({"y": one.double()}, {"y": one})
