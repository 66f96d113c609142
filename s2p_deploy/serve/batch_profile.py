"""How long an engine takes for a batch, measured where it runs, and the batch beyond which more gains little."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from s2p_deploy.bench.workload import random_inputs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from s2p_deploy.engines import BoundRunner

_ENOUGH = 1.1  # times the best seconds per sample: a batch that comes so near is large enough
_RUNS = 5


@dataclass(frozen=True)
class BatchProfile:
    """Batch sizes, ascending, and the seconds that the engine takes for each at its best."""

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]

    @property
    def cap(self) -> int:
        """The largest batch that is worth forming."""
        return self.sizes[-1]

    @property
    def seconds_per_sample(self) -> float:
        """At the largest batch."""
        return self.seconds[-1] / self.sizes[-1]

    def padded(self, samples: int) -> int:
        """The smallest profiled batch that holds so many samples; fewer or more than any was profiled with stay."""
        if samples < self.sizes[0]:
            return samples
        return next((size for size in self.sizes if size >= samples), samples)


def profile_batches(runner: BoundRunner, row: int, sizes: Sequence[int]) -> BatchProfile:
    """Times the engine at every size, up to the first that comes within 10 % of the best time per sample.

    Every size is compiled for where the backend gains by it (:meth:`BoundRunner.tune`); sizes outside the engine's
    profile are left out. ``row`` is any row of its scale table.
    """
    taken = [size for size in sizes if runner.profile.minimum <= size <= runner.profile.maximum]
    wanted = taken or [runner.profile.optimum]
    runner.tune(*wanted)
    found = {size: _seconds(runner, row, size) for size in wanted}
    return up_to_the_knee(found)


def up_to_the_knee(seconds: Mapping[int, float]) -> BatchProfile:
    """The profile of measured seconds by batch size, without sizes that gain too little."""
    best = min(time / size for size, time in seconds.items())
    cap = min(size for size, time in seconds.items() if time / size <= _ENOUGH * best)
    sizes = tuple(sorted(size for size in seconds if size <= cap))
    return BatchProfile(sizes, tuple(seconds[size] for size in sizes))


def _seconds(runner: BoundRunner, row: int, batch: int) -> float:
    """Of the fastest of a few runs: what else the machine does only ever adds."""
    inputs = random_inputs(runner.inputs, runner.profile.sizes("optimum") | {"batch": batch}, row, 0)
    runner.infer(inputs)  # warms up
    return min(_timed(runner, inputs) for _ in range(_RUNS))


def _timed(runner: BoundRunner, inputs: Mapping[str, NDArray[Any]]) -> float:
    start = time.perf_counter()
    runner.infer(inputs)
    return time.perf_counter() - start
