from __future__ import annotations

import numpy as np
import pytest

from s2p_deploy.validation.numbers import mean_of, median_of, picks, quantile_of, ratio_of, resampled


def test_a_number_says_how_many_samples_it_comes_from() -> None:
    assert median_of(np.array([1.0, 2.0, 9.0])).n == 3
    assert median_of(np.array([1.0, 2.0, 9.0])).value == 2.0
    assert mean_of(np.array([1.0, 2.0, 9.0])).value == 4.0


def test_the_interval_holds_the_value_and_is_the_same_every_time() -> None:
    values = np.random.default_rng(0).normal(10.0, 2.0, 100)
    number = mean_of(values)
    assert number.low is not None
    assert number.high is not None
    assert number.low < number.value < number.high
    # 1.96 standard errors to either side
    assert number.high - number.low == pytest.approx(2 * 1.96 * values.std() / 10, rel=0.15)
    assert mean_of(values) == number


def test_equal_values_have_no_width() -> None:
    number = median_of(np.full(5, 3.0))
    assert (number.low, number.value, number.high) == (3.0, 3.0, 3.0)


def test_a_ratio_weighs_by_the_wholes() -> None:
    number = ratio_of(np.array([1, 5]), np.array([2, 10]))
    assert (number.value, number.n) == (0.5, 2)
    assert ratio_of(np.array([2, 0]), np.array([2, 6])).value == 0.25


def test_a_quantile_has_an_interval_too() -> None:
    found = quantile_of(np.arange(101.0), 0.1)
    assert (found.value, found.n) == (10.0, 101)
    assert found.low is not None
    assert found.high is not None
    assert found.low < 10.0 < found.high


def test_an_interval_over_given_resamples() -> None:
    found = resampled(5.0, 3, np.linspace(0, 10, 1001))
    assert (found.value, found.n, found.low, found.high) == (5.0, 3, pytest.approx(0.25), pytest.approx(9.75))
    assert picks(4, 7).shape == (7, 4)
    assert (picks(4, 7) == picks(4, 7)).all()
