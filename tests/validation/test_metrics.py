from __future__ import annotations

import numpy as np
import pytest

from s2p_deploy.validation.metrics import (
    PSNR_CEILING,
    SQNR_CEILING,
    frechet_distance,
    haarpsi,
    pooled_sqnr_db,
    psnr_db,
    relative_error,
    shifted,
    sqnr_db,
    ssim,
)


def picture(side: int = 64) -> np.ndarray:
    """A picture with gradients and edges: float32 [1, side, side, 3]."""
    y, x = np.mgrid[0:side, 0:side]
    checks = ((x // 8 + y // 8) % 2) * 0.8
    return np.stack([x / (side - 1), y / (side - 1), checks], -1).astype(np.float32)[None]


def test_sqnr_of_a_tenth_is_20_db_per_sample() -> None:
    reference = np.ones((2, 3, 4), np.float32)
    candidate = reference.copy()
    candidate[0] += 0.1
    np.testing.assert_allclose(sqnr_db(reference, candidate), [20.0, SQNR_CEILING], atol=1e-5)


def test_pooled_sqnr_by_hand() -> None:
    assert pooled_sqnr_db(100.0, 1.0) == pytest.approx(20.0)
    assert pooled_sqnr_db(1.0, 0.0) == SQNR_CEILING


def test_what_is_not_a_number_stays_not_a_number() -> None:
    reference = np.ones((1, 4), np.float32)
    assert np.isnan(sqnr_db(reference, reference * np.nan)[0])
    assert np.isnan(psnr_db(picture(), picture() * np.nan)[0])
    assert np.isnan(pooled_sqnr_db(1.0, np.nan))


def test_relative_error_by_hand() -> None:
    assert relative_error(np.array([[3.0, 4.0]]), np.array([[3.0, 4.5]]))[0] == pytest.approx(0.1)


def test_psnr_of_a_tenth_is_20_db_and_of_equals_the_ceiling() -> None:
    assert psnr_db(picture(), picture() + 0.1)[0] == pytest.approx(20.0, abs=1e-4)
    assert psnr_db(picture(), picture())[0] == PSNR_CEILING


def test_ssim_is_one_for_equals_and_less_for_noise() -> None:
    noisy = picture() + np.random.default_rng(0).normal(0, 0.1, picture().shape).astype(np.float32)
    assert ssim(picture(), picture())[0] == pytest.approx(1.0)
    assert 0.2 < ssim(picture(), noisy)[0] < 0.9


def test_haarpsi_agrees_with_piq() -> None:
    """The golden numbers are piq 0.8.0's for these very pictures."""
    rng = np.random.default_rng(0)
    base = picture().repeat(3, 0)
    base[1] = rng.random((64, 64, 3))
    base[2] = 1 - base[0]
    noisy = np.clip(base + rng.normal(0, 0.1, base.shape), 0, 1).astype(np.float32)
    np.testing.assert_allclose(haarpsi(base, noisy), [0.7862, 0.7940, 0.7604], atol=1e-3)


def test_haarpsi_of_equals_is_one_even_for_black() -> None:
    np.testing.assert_allclose(haarpsi(picture(), picture()), 1.0, atol=1e-6)
    black = np.zeros((1, 16, 16, 3), np.float32)
    assert haarpsi(black, black)[0] == pytest.approx(1.0)


def test_a_shift_moves_whole_pixels_and_repeats_the_edge() -> None:
    picture = np.arange(4, dtype=np.float32).reshape(1, 2, 2, 1)
    assert shifted(picture, 1, 0)[0, :, :, 0].tolist() == [[0, 1], [0, 1]]
    assert shifted(picture, -1, 0)[0, :, :, 0].tolist() == [[2, 3], [2, 3]]
    assert shifted(picture, 0, 1)[0, :, :, 0].tolist() == [[0, 0], [2, 2]]


def test_frechet_distance_of_moved_features_is_the_square_of_the_way() -> None:
    features = np.random.default_rng(0).normal(size=(50, 4))
    assert frechet_distance(features, features) == pytest.approx(0.0, abs=1e-6)
    assert frechet_distance(features, features + np.array([3, 4, 0, 0])) == pytest.approx(25.0, abs=1e-6)


def test_frechet_distance_of_wider_features_by_hand() -> None:
    """Equal means, covariances C and 4 C: trace of C + 4 C - 2 * 2 C = trace of C."""
    features = np.random.default_rng(0).normal(size=(500, 3))
    centred = features - features.mean(0)
    trace = np.trace(np.cov(centred, rowvar=False))
    assert frechet_distance(centred, 2 * centred) == pytest.approx(trace, rel=1e-6)
