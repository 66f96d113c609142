"""From what was measured of an engine to its figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from s2p_deploy.bench.result import EngineFigures, Memory, Ratios
from s2p_deploy.validation.numbers import median_of, picks, quantile_of, resampled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from s2p_deploy.records import Engine, Number


@dataclass(frozen=True)
class Samples:
    """Seconds of one engine: until the first step's result, of steps [rounds, steps], of pictures; and its memory."""

    load: float
    steps: NDArray[np.float64]
    pictures: tuple[float, ...]
    memory: Memory


def figures_of(engine: Engine, own: Samples, baseline: tuple[Engine, Samples] | None) -> EngineFigures:
    """One engine's figures, with ratios to the baseline's; None: it is the baseline."""
    pictures = median_of(np.asarray(own.pictures)) if own.pictures else None
    return EngineFigures(
        name=engine.folder.resolve().name,
        digest=engine.manifest.digest,
        recipe=str(engine.manifest.recipe["name"]),
        size=size_on_disk(engine),
        load_seconds=own.load,
        memory=own.memory,
        step_p50=median_of(own.steps.flatten()),
        step_p95=quantile_of(own.steps.flatten(), 0.95),
        picture_seconds=pictures,
        images_per_minute=60 / pictures.value if pictures else None,
        ratios=_ratios(engine, own, *baseline) if baseline else None,
    )


def _ratios(engine: Engine, own: Samples, against: Engine, baseline: Samples) -> Ratios:
    faster = ratio_of_medians(_column(baseline.pictures), _column(own.pictures)) if own.pictures else None
    return Ratios(
        step=ratio_of_medians(own.steps, baseline.steps),
        images_per_minute=faster,
        load=own.load / baseline.load,
        steady_memory=own.memory.steady / baseline.memory.steady,
        peak_memory=own.memory.peak / baseline.memory.peak,
        size=size_on_disk(engine) / size_on_disk(against),
    )


def ratio_of_medians(times: NDArray[np.float64], reference: NDArray[np.float64]) -> Number:
    """Median of times [rounds, n] over that of the reference's [rounds, n].

    The interval resamples rounds, both sides' alike: what slowed a round slowed it for both.
    """
    rounds = picks(len(times))
    resamples = [np.median(values[rounds].reshape(len(rounds), -1), axis=1) for values in (times, reference)]
    return resampled(float(np.median(times) / np.median(reference)), times.size, resamples[0] / resamples[1])


def size_on_disk(engine: Engine) -> int:
    """Bytes of an engine's files, its manifest left out."""
    return sum((engine.folder / name).stat().st_size for name in engine.manifest.files)


def _column(values: Sequence[float]) -> NDArray[np.float64]:
    return np.asarray(values, np.float64)[:, None]
