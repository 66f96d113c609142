from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from s2p_deploy.validation import distances
from s2p_deploy.validation.distances import distance_of
from s2p_deploy.validation.metrics import frechet_distance
from s2p_deploy.validation.numbers import Number, Skipped


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
    monkeypatch.setattr(distances, "_MOST_RESAMPLED", 5)
    assert distance_of(first, second) == Number(found.value, 64)


def test_what_has_no_distance() -> None:
    one = np.zeros((1, 4))
    assert isinstance(distance_of(one, one), Skipped)
    found = distance_of(np.zeros((3, 4)), np.full((3, 4), np.nan))
    assert isinstance(found, Number)
    assert np.isnan(found.value)
