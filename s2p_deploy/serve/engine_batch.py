"""Calls of several drawings in one run of the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.engines.runner import OUTPUT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from s2p_deploy.engines import Runner
    from s2p_deploy.serve.drawing import EngineCall

CallKey = tuple[object, ...]


def call_key(call: EngineCall, *, mixed_rows: bool) -> CallKey:
    """Calls of one key fit into one batch: their samples have one shape, and one row where the engine needs that."""
    shapes = tuple((name, value.shape[1:]) for name, value in sorted(call.inputs.items()))
    return shapes if mixed_rows else (*shapes, tuple(np.unique(call.inputs["step_index"])))


def run_calls(runner: Runner, calls: Sequence[EngineCall], batch: int) -> list[dict[str, NDArray[Any]]]:
    """The outputs of every call, in order, from one run at ``batch`` samples.

    Samples that are missing to the batch repeat the first one: a batch of fixed size is what engines are fastest at,
    and at equal size no sample's bits depend on its neighbours.
    """
    inputs = {name: _padded([call.inputs[name] for call in calls], batch) for name in calls[0].inputs}
    output = runner.infer(inputs)[OUTPUT]
    ends = np.cumsum([call.samples for call in calls])
    return [{OUTPUT: part} for part in np.split(output, ends)[: len(calls)]]


def _padded(parts: list[NDArray[Any]], batch: int) -> NDArray[Any]:
    missing = batch - sum(map(len, parts))
    return np.concatenate([*parts, *[parts[0][:1]] * max(0, missing)])
