from __future__ import annotations

import pytest

from s2p_deploy.serve.batch_profile import BatchProfile, up_to_the_knee


def test_the_cap_is_the_smallest_batch_near_the_best_time_per_sample() -> None:
    found = up_to_the_knee({1: 2.0, 2: 3.0, 4: 4.2, 8: 8.0, 16: 16.5})  # per sample 2, 1.5, 1.05, 1, 1.03
    assert found == BatchProfile((1, 2, 4), (2.0, 3.0, 4.2))
    assert found.cap == 4
    assert found.seconds_per_sample == pytest.approx(1.05)


def test_an_engine_that_gains_nothing_is_given_one_sample_at_a_time() -> None:
    assert up_to_the_knee({1: 1.0, 2: 2.0, 4: 4.0}).cap == 1


@pytest.mark.parametrize(("samples", "padded"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8), (9, 9)])
def test_batches_are_padded_to_the_next_profiled_one(samples: int, padded: int) -> None:
    assert BatchProfile((2, 4, 8), (1.0, 1.0, 1.0)).padded(samples) == padded
