"""What a child does when it is asked: load, run steps, draw pictures; how long each takes, and the memory it holds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from s2p_deploy.bench.turns import answer_requests
from s2p_deploy.engines.profile_shapes import shape_at

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from s2p_deploy.records import TensorSpec

_OF_THE_PROMPT = {"encoder_hidden_states", "added_cond"}
_UNITS = {"rss": "VmRSS", "peak": "VmHWM"}


class Workload(Protocol):
    """Something loaded that can be run."""

    def step(self, number: int) -> None:
        """One call of the denoiser, on other latents than the call before."""

    def open_pipeline(self) -> None:
        """Loads what drawing needs besides the denoiser."""

    def draw(self, number: int) -> None:
        """One picture from text to pixels."""


def serve_workload(opened: Callable[[dict[str, Any]], Workload]) -> None:
    """Answers requests about a workload that ``opened`` makes of the first one.

    ``load`` opens it and runs one step, because some backends compile only then; ``steps`` runs one step unmeasured and
    then ``count``; ``pipeline`` and ``picture`` draw. Times are wall seconds, memory is in bytes.
    """
    held: dict[str, Workload] = {}
    calls = iter(range(2**62))

    def load(request: dict[str, Any]) -> dict[str, Any]:
        before = memory()
        start = time.perf_counter()
        held["it"] = opened(request)
        held["it"].step(next(calls))
        return {"seconds": time.perf_counter() - start, "before": before["rss"], "loaded": memory()["rss"]}

    def steps(request: dict[str, Any]) -> dict[str, Any]:
        held["it"].step(next(calls))
        return {"seconds": [_timed(held["it"].step, next(calls)) for _ in range(request["count"])]} | memory()

    def pipeline(_request: dict[str, Any]) -> dict[str, Any]:
        held["it"].open_pipeline()
        return {}

    def picture(request: dict[str, Any]) -> dict[str, Any]:
        return {"seconds": _timed(held["it"].draw, request["number"])}

    answer_requests({"load": load, "steps": steps, "pipeline": pipeline, "picture": picture})


def memory() -> dict[str, int]:
    """Bytes resident in this process: ``rss`` at the moment, ``peak`` since its start (Linux; 0 elsewhere)."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.exists() else []
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields.get(field, "0").split()[0]) * 1024 for name, field in _UNITS.items()}


def random_inputs(
    specs: Sequence[TensorSpec], sizes: Mapping[str, int], row: int, number: int
) -> dict[str, NDArray[Any]]:
    """Standard normal values for every input but ``step_index``: all samples are on one row, as in a pipeline.

    ``sizes`` gives every dynamic size by its name. What comes from the prompt is the same for every ``number``, as it
    is for a picture's steps.
    """
    of_step, of_prompt = np.random.default_rng(number), np.random.default_rng(0)
    values: dict[str, NDArray[Any]] = {}
    for spec in specs:
        shape = shape_at(spec, sizes)
        if spec.name == "step_index":
            values[spec.name] = np.full(shape, row, np.int64)
        else:
            random = of_prompt if spec.name in _OF_THE_PROMPT else of_step
            values[spec.name] = random.standard_normal(shape).astype(spec.dtype)
    return values


def _timed(run: Callable[[int], None], number: int) -> float:
    start = time.perf_counter()
    run(number)
    return time.perf_counter() - start
