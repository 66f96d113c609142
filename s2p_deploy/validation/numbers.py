"""A measured number: never without how many samples it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

_RESAMPLES = 2000
_SEED = 0
_INTERVAL = (0.025, 0.975)


@dataclass(frozen=True)
class Number:
    """A value over ``n`` samples; ``low`` and ``high`` are its 95 % bootstrap interval, where it has one."""

    value: float
    n: int
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Skipped:
    """What was not measured, and why."""

    reason: str


def median_of(values: NDArray[Any]) -> Number:
    """Median of [n] with its interval."""
    return _with_interval(np.asarray(values, dtype=np.float64), np.median)


def mean_of(values: NDArray[Any]) -> Number:
    """Mean of [n] with its interval."""
    return _with_interval(np.asarray(values, dtype=np.float64), np.mean)


def ratio_of(parts: NDArray[Any], wholes: NDArray[Any]) -> Number:
    """Sum of parts [n] over the sum of wholes [n], with its interval over the n samples."""
    picks = _picks(len(parts))
    low, high = np.quantile(parts[picks].sum(1) / wholes[picks].sum(1), _INTERVAL)
    return Number(float(parts.sum() / wholes.sum()), len(parts), float(low), float(high))


def _with_interval(values: NDArray[np.float64], statistic: Callable[..., Any]) -> Number:
    low, high = np.quantile(statistic(values[_picks(len(values))], axis=1), _INTERVAL)
    return Number(float(statistic(values)), len(values), float(low), float(high))


def _picks(n: int) -> NDArray[np.int64]:
    """Bootstrap resamples [resamples, n] with a fixed seed: the same values give the same interval."""
    return np.random.default_rng(_SEED).integers(n, size=(_RESAMPLES, n))
