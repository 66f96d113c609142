"""Rows: which row of the scale table a sample on some timestep uses, and where the scales of each row come from.

Where the time table is constant (SD1/SD2), rows are the training timesteps 0..999 and a sample's row is its integer
timestep. The row is data that travels with the sample, never a counter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from s2p_deploy.records import TimestepTable


def angles_from_alphas(alphas_cumprod: NDArray[np.float64]) -> NDArray[np.float64]:
    """atan2(sigma, alpha) float64 [rows] of a variance-preserving schedule with the given cumulative alphas."""
    values = np.asarray(alphas_cumprod, dtype=np.float64)
    return np.arctan2(np.sqrt(1 - values), np.sqrt(values))


def rows_of_timesteps(
    timesteps: Sequence[float] | NDArray[np.floating[Any]], table: TimestepTable
) -> NDArray[np.int64]:
    """Rows int64 [n] of scheduler timesteps.

    Raises:
        InputError: a timestep is fractional (it needs the input form of the time table) or outside the covered rows.
    """
    values = np.asarray(timesteps, dtype=np.float64).reshape(-1)
    rows = np.rint(values)
    if not np.array_equal(rows, values):
        raise InputError(
            f"timestep {values[rows != values][0]:g} is fractional: "
            "this schedule needs an engine exported with --time-table input"
        )
    first, last = table.covered
    outside = (rows < first) | (rows > last)
    if outside.any():
        raise InputError(
            f"timestep {rows[outside][0]:.0f} is outside the calibrated table ({first} to {last}): calibrate for it"
        )
    return rows.astype(np.int64)


def spread_over_rows(scales: NDArray[np.float32], table: TimestepTable) -> NDArray[np.float32]:
    """Scales of all rows, float32 [rows, points], from those of the calibrated rows, [len(calibrated), points].

    Calibrated rows keep their values bit for bit; rows between them interpolate log scale linearly over the angle; rows
    beyond either end hold the end row's value.
    """
    known = np.asarray(table.calibrated)
    if scales.shape[0] != len(known):
        raise InputError(f"{scales.shape[0]} rows of scales for {len(known)} calibrated timesteps")
    logs = np.log(scales.astype(np.float64))
    columns = [np.interp(table.angle, table.angle[known], logs[:, point]) for point in range(scales.shape[1])]
    full = np.exp(np.stack(columns, axis=1)) if columns else np.ones((table.rows, 0))
    spread = full.astype(np.float32)
    spread[known] = scales
    return spread
