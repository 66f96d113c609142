"""Projected time features of the rows that are bound to an engine of the input form, by its conditioning graph."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from s2p_deploy.engines.runner import PROJECTIONS
from s2p_deploy.engines.side_graph import SideGraph
from s2p_deploy.errors import IntegrityError
from s2p_deploy.records.exported_graph import CONDITIONING_FILE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from s2p_deploy.records import Engine

    # timesteps float32 [n] and added_cond float32 [n, A] -> features [n, P] in the engine's dtype
    Condition = Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.floating[Any]]]

_MOST_BYTES = 2**29  # of features that are kept for prompts seen before


class TimeFeatures(Protocol):
    """Projected time features by row. ``added_width`` is A, the width of what else they depend on."""

    added_width: int

    def of(self, rows: NDArray[np.int64], added_cond: NDArray[np.float32] | None) -> NDArray[np.floating[Any]]:
        """Features [batch, P] of rows [batch], for ``added_cond`` [batch, A] where A is not 0."""


class StoredFeatures:
    """Features [rows, P] of all rows, where they depend on the timestep alone."""

    added_width = 0

    def __init__(self, table: NDArray[np.floating[Any]]) -> None:
        self.table = table

    def of(self, rows: NDArray[np.int64], _added_cond: NDArray[np.float32] | None = None) -> NDArray[np.floating[Any]]:
        """Rows of the table."""
        found: NDArray[np.floating[Any]] = self.table[rows]
        return found


class PromptFeatures:
    """Features that depend on the prompt too: computed once per prompt for all rows ``ahead``, and kept.

    Other rows are computed when they are asked for. Those of the prompts used last are kept, in ``most_bytes`` or one
    prompt.
    """

    def __init__(
        self,
        condition: Condition,
        timesteps: NDArray[np.float64],
        ahead: Sequence[int],
        added_width: int,
        most_bytes: int = _MOST_BYTES,
    ) -> None:
        self.added_width, self._most_bytes = added_width, most_bytes
        self._condition, self._timesteps, self._ahead = condition, timesteps.astype(np.float32), tuple(ahead)
        self._kept: OrderedDict[bytes, dict[int, NDArray[np.floating[Any]]]] = OrderedDict()

    def of(self, rows: NDArray[np.int64], added_cond: NDArray[np.float32] | None) -> NDArray[np.floating[Any]]:
        """See :class:`TimeFeatures`."""
        assert added_cond is not None, "the inputs were checked"
        return np.stack([self._one(int(row), added) for row, added in zip(rows, added_cond, strict=True)])

    def _one(self, row: int, added: NDArray[np.float32]) -> NDArray[np.floating[Any]]:
        known = self._kept.setdefault(added.tobytes(), {})
        self._kept.move_to_end(added.tobytes())
        if row not in known:
            missing = [row] if known else list(dict.fromkeys((row, *self._ahead)))
            found = self._condition(self._timesteps[missing], np.repeat(added[None], len(missing), 0))
            known.update(zip(missing, found, strict=True))
            self._forget(known[row].nbytes)
        return known[row]

    def _forget(self, each: int) -> None:
        """Drops prompts from the oldest on, never the last."""
        while len(self._kept) > 1 and each * sum(map(len, self._kept.values())) > self._most_bytes:
            self._kept.popitem(last=False)


def time_features(engine: Engine, timesteps: NDArray[np.float64], ahead: Sequence[int]) -> TimeFeatures:
    """The features of an engine's rows, whose ``timesteps`` are float64 [rows], by its ``conditioning.onnx``.

    ONNX Runtime runs it, on the CPU, whatever the engine's backend is. ``ahead`` are the rows that a prompt will ask
    for.

    Raises:
        IntegrityError: the file is missing or was changed, or is no graph of that kind.
    """
    width = engine.added_width
    condition = _conditioning(engine)
    if width:
        condition(timesteps[list(ahead[:1])].astype(np.float32), np.zeros((1, width), np.float32))  # is it one?
        return PromptFeatures(condition, timesteps, ahead, width)
    return StoredFeatures(condition(timesteps.astype(np.float32), np.zeros((len(timesteps), 0), np.float32)))


def _conditioning(engine: Engine) -> Condition:
    graph = SideGraph(engine, CONDITIONING_FILE, "--time-table input")
    spec = next(spec for spec in engine.inputs if spec.name == PROJECTIONS)

    def condition(timesteps: NDArray[np.float32], added_cond: NDArray[np.float32]) -> NDArray[np.floating[Any]]:
        given = {"timesteps": timesteps} | ({"added_cond": added_cond} if added_cond.shape[1] else {})
        wanted = (len(timesteps), spec.shape[1])
        with np.errstate(over="ignore"):
            features: NDArray[np.floating[Any]] = graph.run(PROJECTIONS, given).astype(spec.dtype, copy=False)
        if features.shape != wanted or not np.isfinite(features).all():
            raise IntegrityError(
                f"{graph.path} gives no {list(wanted)} features, finite in {spec.dtype}: export the graph again"
            )
        return features

    return condition
