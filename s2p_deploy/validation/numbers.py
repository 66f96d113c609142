"""A measured number: never without how many samples it comes from."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.records import Number, Skipped

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

__all__ = ["Number", "Skipped", "mean_of", "median_of", "picks", "quantile_of", "ratio_of", "resampled"]

_RESAMPLES = 2000
_SEED = 0
_INTERVAL = (0.025, 0.975)


def median_of(values: NDArray[Any]) -> Number:
    """Median of [n] with its interval."""
    return _with_interval(np.asarray(values, dtype=np.float64), np.median)


def mean_of(values: NDArray[Any]) -> Number:
    """Mean of [n] with its interval."""
    return _with_interval(np.asarray(values, dtype=np.float64), np.mean)


def quantile_of(values: NDArray[Any], quantile: float) -> Number:
    """A quantile of [n] with its interval."""
    return _with_interval(np.asarray(values, dtype=np.float64), partial(np.quantile, q=quantile))


def ratio_of(parts: NDArray[Any], wholes: NDArray[Any]) -> Number:
    """Sum of parts [n] over the sum of wholes [n], with its interval over the n samples."""
    chosen = picks(len(parts))
    return resampled(float(parts.sum() / wholes.sum()), len(parts), parts[chosen].sum(1) / wholes[chosen].sum(1))


def resampled(value: float, n: int, values: NDArray[Any]) -> Number:
    """A number over ``n`` samples with the interval of its ``values`` [resamples] over resamples of :func:`picks`."""
    low, high = np.quantile(values, _INTERVAL)
    return Number(value, n, float(low), float(high))


def picks(n: int, resamples: int = _RESAMPLES) -> NDArray[np.int64]:
    """Bootstrap resamples [resamples, n] with a fixed seed: the same values give the same interval."""
    return np.random.default_rng(_SEED).integers(n, size=(resamples, n))


def _with_interval(values: NDArray[np.float64], statistic: Callable[..., Any]) -> Number:
    return resampled(float(statistic(values)), len(values), statistic(values[picks(len(values))], axis=1))
