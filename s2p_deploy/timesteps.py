"""Rows: which row of the scale table a sample on some timestep uses, and where the scales of each row come from.

The first rows are the training timesteps 0..999, so a sample's row is its integer timestep. Where the time table is an
input, rows of fractional timesteps follow: those of the calibrated schedule and of the schedules that are bound. The
row is data that travels with the sample, never a counter.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.errors import InputError
from s2p_deploy.records import ScaleTable, TimestepTable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    Timesteps = Sequence[float] | NDArray[np.floating[Any]]

_SAME = 1e-3  # of a training timestep; float32, and a scheduler's way from sigma to timestep and back, move one by less
_MOST_SIGMA = 4096.0  # where alpha is zero, as diffusers' own schedulers take it


@dataclass(frozen=True)
class RowOrigins:
    """Distinct timesteps, ascending, by where their scales come from.

    ``calibrated`` rows were trained, ``interpolated`` ones lie between two of those, ``held`` ones have the value of
    the nearest end.
    """

    calibrated: tuple[float, ...]
    interpolated: tuple[float, ...]
    held: tuple[float, ...]

    def __str__(self) -> str:
        return ", ".join(f"{len(getattr(self, kind.name))} {kind.name}" for kind in dataclasses.fields(self))


def timestep_table_of(
    scheduler: Any,  # noqa: ANN401 - diffusers' schedulers share no typed base
    steps: int,
    *,
    fractional: bool,
) -> TimestepTable:
    """The rows of a scheduler, all of its schedule calibrated; ``fractional`` timesteps get rows of their own.

    Raises:
        InputError: it has no such number of steps, no known kind of noise schedule, or fractional timesteps that are
            not allowed.
    """
    name, copied = type(scheduler).__name__, type(scheduler).from_config(scheduler.config)
    try:
        copied.set_timesteps(steps)
    except ValueError as error:
        raise InputError(f"{name} has no {steps} steps: {error}") from error
    config = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    flow = not hasattr(scheduler, "alphas_cumprod")
    if flow and not hasattr(scheduler, "scale_noise"):
        raise InputError(f"{name} is neither variance preserving (alphas_cumprod) nor flow matching (scale_noise)")
    training = config["num_train_timesteps"]
    levels = np.arange(training + 1) / training if flow else angles_from_alphas(scheduler.alphas_cumprod.numpy())
    asked = np.unique(_flat(copied.timesteps.double().numpy()))
    whole = _close(asked, np.rint(asked))
    if not (fractional or whole.all()):
        raise InputError(
            f"{name} asks for the fractional timestep {asked[~whole][0]:g}: use a schedule of integer timesteps"
        )
    calibrated = np.where(whole, np.rint(asked), asked)  # a scheduler's way from sigma to timestep rounds
    own = calibrated if flow or not whole.all() else _flat(())
    return TimestepTable(name, config, steps, tuple(calibrated.tolist()), levels, flow, own if fractional else None)


def angles_from_alphas(alphas_cumprod: NDArray[np.float64]) -> NDArray[np.float64]:
    """atan2(sigma, alpha) float64 [rows] of a variance-preserving schedule with the given cumulative alphas."""
    values = np.asarray(alphas_cumprod, dtype=np.float64)
    return np.arctan2(np.sqrt(1 - values), np.sqrt(values))


def angles_of_timesteps(timesteps: Timesteps, table: TimestepTable) -> NDArray[np.float64]:
    """The noise level float64 [n] of timesteps, fractional ones included, in the unit of ``table.angle``.

    Between two training timesteps log sigma is linear in the timestep, which is how diffusers maps the sigmas of Karras
    and other schedules to timesteps. For flow matching sigma is.
    """
    values, training = _flat(timesteps), np.arange(len(table.angle))
    if table.flow_matching:
        levels: NDArray[np.float64] = np.interp(values, training, table.angle)
        return levels
    sigmas = np.clip(np.tan(table.angle), 1 / _MOST_SIGMA, _MOST_SIGMA)
    angles: NDArray[np.float64] = np.arctan(np.exp(np.interp(values, training, np.log(sigmas))))
    whole = np.rint(values) == values
    angles[whole] = table.angle[values[whole].astype(np.int64)]
    return angles


def with_schedules(table: TimestepTable, schedules: Iterable[Timesteps], *, covered: bool = True) -> TimestepTable:
    """``table`` with rows for all timesteps of the schedules too: each distinct fractional one gets a row of its own.

    For an engine whose time table is an input. Integer timesteps have their rows already.

    Raises:
        InputError: a timestep is outside the covered range (where ``covered`` is asked for), or no number.
    """
    values = np.unique(np.concatenate([_flat(()), *(_flat(schedule) for schedule in schedules)]))
    if covered:
        _check_covered(values, table)
    if np.isnan(values).any():
        raise InputError("a schedule has a timestep that is no number")
    known = _flat(()) if table.fractional is None else table.fractional
    added = values[~_is_training(values, table)]
    if len(known):
        added = added[np.abs(added[:, None] - known).min(1) > _SAME]
    return dataclasses.replace(table, fractional=np.union1d(known, added))


def rows_of_timesteps(timesteps: Timesteps, table: TimestepTable, *, covered: bool = True) -> NDArray[np.int64]:
    """Rows int64 [n] of scheduler timesteps, each looked up by its value, to a thousandth of a timestep.

    Raises:
        InputError: a timestep is outside the covered range (where ``covered`` is asked for), or has no row.
    """
    values = _flat(timesteps)
    if covered:
        _check_covered(values, table)
    whole = _is_training(values, table)
    rows = np.where(whole, np.rint(values), -1).astype(np.int64)
    if whole.all():
        return rows
    fractional = _flat(()) if table.fractional is None else table.fractional
    if len(fractional):
        gaps = np.abs(values[~whole, None] - fractional)
        found = gaps.argmin(1)
        rows[~whole] = np.where(gaps.min(1) <= _SAME, table.training_rows + found, -1)
    if (rows < 0).any():
        raise InputError(f"timestep {values[rows < 0][0]:g} is fractional: {_remedy(table)}")
    return rows


def row_origins(timesteps: Timesteps, table: TimestepTable) -> RowOrigins:
    """Where the scales of a schedule's rows come from."""
    values = np.unique(_flat(timesteps))
    known = np.asarray(table.calibrated, dtype=np.float64)
    calibrated = (np.abs(values[:, None] - known) <= _SAME).any(1)
    held = ~calibrated & ((values < known[0]) | (values > known[-1]))
    kinds = (calibrated, ~calibrated & ~held, held)
    return RowOrigins(*(tuple(values[kind].tolist()) for kind in kinds))


def spread_over_rows(scales: NDArray[np.float32], table: TimestepTable) -> NDArray[np.float32]:
    """Scales of all rows, float32 [rows, points], from those of the calibrated rows, [len(calibrated), points].

    Calibrated rows keep their values bit for bit; rows between them interpolate log scale linearly over the angle; rows
    beyond either end hold the end row's value.
    """
    known = list(table.calibrated_rows)
    if scales.shape[0] != len(known):
        raise InputError(f"{scales.shape[0]} rows of scales for {len(known)} calibrated timesteps")
    spread = _interpolated(scales, table, angles_of_timesteps(table.timesteps, table))
    spread[known] = scales
    return spread


def scales_of_rows(scales: ScaleTable, own: TimestepTable, bound: TimestepTable) -> ScaleTable:
    """``scales`` [rows of ``own``, points] with rows for the further timesteps of ``bound``, if it has any.

    Rows that are there keep every bit; the others come from the calibrated rows as in :func:`spread_over_rows`.
    """
    if bound.rows == own.rows:
        return scales
    present = rows_of_timesteps(own.timesteps, bound, covered=False)
    calibrated = scales.scales[list(own.calibrated_rows)]
    spread = _interpolated(calibrated, own, angles_of_timesteps(bound.timesteps, own))
    spread[present] = scales.scales
    return dataclasses.replace(scales, scales=spread)


def _interpolated(
    scales: NDArray[np.float32], table: TimestepTable, angles: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Scales float32 [len(angles), points] from those of the calibrated rows, [len(calibrated), points]."""
    known = angles_of_timesteps(np.asarray(table.calibrated), table)
    logs = np.log(scales.astype(np.float64))
    columns = [np.interp(angles, known, logs[:, point]) for point in range(scales.shape[1])]
    values = np.exp(np.stack(columns, axis=1)) if columns else np.ones((len(angles), 0))
    return values.astype(np.float32)


def _check_covered(values: NDArray[np.float64], table: TimestepTable) -> None:
    first, last = table.covered
    outside = (values < first - _SAME) | (values > last + _SAME)
    if outside.any():
        raise InputError(
            f"timestep {values[outside][0]:g} is outside the calibrated table ({first:g} to {last:g}): calibrate for it"
        )


def _is_training(values: NDArray[np.float64], table: TimestepTable) -> NDArray[np.bool_]:
    """Which of the values are training timesteps with rows of their own."""
    return _close(values, np.rint(values)) & (table.training_rows > 0)


def _remedy(table: TimestepTable) -> str:
    if table.fractional is None:
        return "this schedule needs an engine exported with --time-table input"
    return "the engine is not bound to this schedule, name its timesteps to load_engine(schedules=...)"


def _close(values: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether they are the same timestep. A value that is no number is none; infinite ones were refused."""
    close: NDArray[np.bool_] = np.abs(values - others) <= _SAME
    return close


def _flat(timesteps: Timesteps) -> NDArray[np.float64]:
    return np.asarray(timesteps, dtype=np.float64).reshape(-1)
