"""Ratios of interleaved measurements."""

from __future__ import annotations

import numpy as np
import pytest

from s2p_deploy.bench.figures import ratio_of_medians


def test_the_ratio_is_that_of_the_medians() -> None:
    own, reference = np.asarray([[1.0, 2.0], [3.0, 100.0]]), np.asarray([[4.0, 4.0], [6.0, 6.0]])
    ratio = ratio_of_medians(own, reference)
    assert (ratio.value, ratio.n) == (pytest.approx(0.5), 4)


def test_a_machine_that_slows_down_for_all_does_not_widen_the_interval() -> None:
    slowing = np.geomspace(1.0, 10.0, 8)[:, None] * np.ones((8, 3))
    ratio = ratio_of_medians(0.7 * slowing, slowing)
    assert ratio.low == pytest.approx(0.7)
    assert ratio.high == pytest.approx(0.7)
    shuffled = ratio_of_medians(0.7 * slowing[::-1], slowing)
    assert shuffled.low is not None
    assert shuffled.low < 0.6
