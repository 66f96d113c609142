from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from s2p_deploy import metrics as module
from s2p_deploy.metrics import (
    PSNR_CEILING,
    SQNR_CEILING,
    STATISTICS,
    certain_statistic,
    distance_of,
    frechet_distance,
    haarpsi,
    mean_of,
    median_of,
    picks,
    picture_statistic,
    pooled_sqnr_db,
    psnr_db,
    quantile_of,
    ratio_of,
    relative_error,
    resampled,
    resampled_distances,
    shifted,
    sqnr_db,
    ssim,
)
from s2p_deploy.records import Number, Skipped


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


@pytest.mark.parametrize("count", [40, 4000])
def test_a_shifted_and_a_scaled_set_have_the_closed_form(count: int) -> None:
    features = np.random.default_rng(0).normal(size=(count, 60))
    variance = np.trace(np.cov(features, rowvar=False))
    assert frechet_distance(features, features + 0.5) == pytest.approx(60 * 0.25, rel=1e-9)
    centred = features - features.mean(0)
    assert frechet_distance(centred, 3 * centred) == pytest.approx(4 * variance, rel=1e-9)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9 * variance)


def test_few_pictures_and_many_take_different_ways_to_the_same_figure() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(50, 8)), rng.normal(0.3, 2, size=(30, 8))
    padded = [np.concatenate([one, np.zeros((len(one), 80))], 1) for one in (first, second)]
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(*padded), rel=1e-12)


class Pooled(torch.nn.Module):
    """Features that torchmetrics takes in place of Inception's."""

    num_features = 12

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(pictures.double() / 255, 4).flatten(1)


def test_it_is_the_distance_that_torchmetrics_computes() -> None:
    pictures = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (2, 64, 3, 8, 8), np.uint8))
    pictures[1] = pictures[1] // 2
    theirs = FrechetInceptionDistance(feature=Pooled(), input_img_size=(3, 8, 8))
    for real, one in ((True, pictures[0]), (False, pictures[1])):
        theirs.update(one, real=real)
    mine = frechet_distance(*(Pooled()(one).numpy() for one in pictures))
    assert mine == pytest.approx(theirs.compute().item(), rel=1e-3)  # theirs sums in float32


def test_a_distance_has_its_n_and_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    first, second = rng.normal(size=(64, 6)), rng.normal(1, 1, size=(64, 6))
    found = distance_of(first, second)
    assert isinstance(found, Number)
    assert found.n == 64
    assert found.low is not None
    assert found.high is not None
    assert 0 < found.low < found.value < found.high < 20
    assert distance_of(first, second) == found
    monkeypatch.setattr(module, "_MOST_RESAMPLED", 5)
    assert distance_of(first, second) == Number(found.value, 64)


def test_distances_of_like_sets_are_of_the_same_resamples() -> None:
    rng = np.random.default_rng(4)
    first = rng.normal(size=(32, 3))
    near, far = (resampled_distances(first, first + way) for way in (1.0, 2.0))
    np.testing.assert_allclose(far - near, 3 * (2.0**2 - 1.0**2))  # the spread of the samples falls out of every pair


def test_what_has_no_distance() -> None:
    one = np.zeros((1, 4))
    assert isinstance(distance_of(one, one), Skipped)
    found = distance_of(np.zeros((3, 4)), np.full((3, 4), np.nan))
    assert isinstance(found, Number)
    assert np.isnan(found.value)


def test_statistics_of_pictures() -> None:
    values = np.arange(11.0)
    assert [picture_statistic(values, at) for at in STATISTICS] == [5.0, 1.0, 0.0]


def test_a_certain_statistic_is_below_the_statistic_and_nears_it() -> None:
    rng = np.random.default_rng(0)
    few, many = rng.normal(40, 2, 20), rng.normal(40, 2, 2000)
    gaps = [picture_statistic(values, "median") - certain_statistic(values, "median", 1000) for values in (few, many)]
    assert gaps[0] > gaps[1] > 0
    assert certain_statistic(few, "worst", 1000) >= few.min()


def test_a_certain_statistic_of_few_new_values_is_lower() -> None:
    values = np.random.default_rng(0).normal(40, 2, 500)
    few, many = (certain_statistic(values, "median", others) for others in (8, 2000))
    # the median of 8 has a standard deviation of 1.25 * 2 / sqrt(8), of which four in five draws exceed -0.84
    assert picture_statistic(values, "median") - few == pytest.approx(0.84 * 0.88, abs=0.2)
    assert many > few
