"""Timestep indices for timesteps that no schedule named when an engine was loaded: given out when one is asked for."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

from s2p_deploy.errors import InputError
from s2p_deploy.timesteps import known_indices, nearest_timesteps

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from s2p_deploy.records import TimestepTable
    from s2p_deploy.timesteps import Timesteps

    # timestep indices, and the timesteps float64 that they stand for from now on
    Assign = Callable[[Sequence[int], NDArray[np.float64]], None]


class SpareTimesteps:
    """The indices behind those of ``table``, ``count`` of them.

    Where all are taken, the one that was asked for longest ago gets the next timestep: an index is good for the call
    that it was asked for, not for later ones. ``assign`` computes what an engine needs at a timestep.
    """

    def __init__(self, table: TimestepTable, count: int, assign: Assign) -> None:
        self._table, self._assign = table, assign
        self._values = np.full(count, np.inf)
        self._used: OrderedDict[int, None] = OrderedDict()  # places in _values, that of the oldest use first

    def __len__(self) -> int:
        """Number of indices that stand for a timestep."""
        return len(self._used)

    def indices(self, timesteps: Timesteps) -> NDArray[np.int64]:
        """Looks up timestep indices, int64 [n]; new timesteps are assigned together.

        Raises:
            InputError: a timestep is outside the table's covered range, or no number; there are more than ``count``.
        """
        values = np.asarray(timesteps, dtype=np.float64).reshape(-1)
        indices = known_indices(values, self._table)
        missing = indices < 0
        if missing.any():
            indices[missing] = len(self._table) + self._places(values[missing])
        return indices

    def _places(self, values: NDArray[np.float64]) -> NDArray[np.int64]:
        distinct, inverse = np.unique(values, return_inverse=True)
        if np.isnan(distinct).any():
            raise InputError("a schedule has a timestep that is no number")
        if len(distinct) > len(self._values):
            raise InputError(
                f"a schedule has {len(distinct)} timesteps that the engine is not bound to, {len(self._values)} are the"
                " most: take fewer steps, or name them to load_engine(schedules=...)"
            )
        places = nearest_timesteps(distinct, self._values)
        for place in places[places >= 0].tolist():
            self._used.move_to_end(place)
        new = [number for number, place in enumerate(places) if place < 0]
        for number in new:
            full = len(self._used) == len(self._values)
            places[number] = self._used.popitem(last=False)[0] if full else len(self._used)
            self._used[int(places[number])] = None
        if new:
            self._values[places[new]] = distinct[new]
            self._assign((len(self._table) + places[new]).tolist(), distinct[new])
        return places[inverse]
