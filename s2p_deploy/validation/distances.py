"""The distance of two sets of pictures in some network's features, with its interval."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from s2p_deploy.validation.metrics import frechet_distance
from s2p_deploy.validation.numbers import Number, Skipped, picks, resampled

if TYPE_CHECKING:
    from numpy.typing import NDArray

_RESAMPLES = 200  # each one is a singular value problem
_MOST_RESAMPLED = 512  # samples or features, whichever are fewer: beyond, one problem takes a second


def distance_of(first: NDArray[np.float64], second: NDArray[np.float64]) -> Number | Skipped:
    """Frechet distance of features [n, d] of the same n samples; a resample takes the same samples of both.

    Samples that a resample repeats widen the distance, of all resamples alike: their spread is the interval, not where
    they lie. There is no interval where it would take long.
    """
    count = len(first)
    if count < 2:
        return Skipped("a distance of distributions needs at least two pictures")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return Number(float("nan"), count)
    value = frechet_distance(first, second)
    if min(first.shape) > _MOST_RESAMPLED:
        return Number(value, count)
    chosen = [some for some in picks(count, _RESAMPLES) if len(set(some.tolist())) > 1]
    again = np.array([frechet_distance(first[some], second[some]) for some in chosen])
    return resampled(value, count, np.maximum(again - again.mean() + value, 0))
