"""Timestep indices: which scales a sample on some timestep uses, and where the scales of each index come from.

The training timesteps 0..999 are their own indices. Where the time table is an input, indices of fractional timesteps
follow: those of the calibrated schedule and of the schedules that are bound. The timestep index is data that travels
with the sample, never a counter.
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
class ScaleOrigins:
    """Distinct timesteps, ascending, by where their scales come from.

    ``calibrated`` ones were trained, ``interpolated`` ones lie between two of those, ``clamped`` ones lie beyond either
    end and have the scales of that end.
    """

    calibrated: tuple[float, ...]
    interpolated: tuple[float, ...]
    clamped: tuple[float, ...]

    def __str__(self) -> str:
        return ", ".join(f"{len(getattr(self, field.name))} {field.name}" for field in dataclasses.fields(self))


def timestep_table_of(
    scheduler: Any,  # noqa: ANN401 - diffusers' schedulers share no typed base
    steps: int,
    *,
    fractional: bool,
    strength: float = 1.0,
) -> TimestepTable:
    """Makes the timestep table of a scheduler with every timestep of its schedule calibrated.

    Args:
        scheduler: a diffusers scheduler; left as it is.
        steps: number of denoising steps.
        fractional: allows fractional timesteps, each of which gets an index of its own.
        strength: share of the schedule that is run, its end.

    Raises:
        InputError: as :func:`s2p_deploy.schedulers.with_steps`; it has no known kind of noise schedule, or fractional
            timesteps that are not allowed.
    """
    from s2p_deploy.schedulers import is_flow_matching, skipped_calls, with_steps  # and with them diffusers

    name, flow = type(scheduler).__name__, is_flow_matching(scheduler)
    if not (flow or hasattr(scheduler, "alphas_cumprod")):
        raise InputError(f"{name} is neither variance preserving (alphas_cumprod) nor flow matching (scale_noise)")
    copied = with_steps(scheduler, steps)
    config = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    if flow and not fractional:
        raise InputError(
            f"{name} is of flow matching, which is supported where time features depend on the prompt too (SDXL, SD3):"
            " with SD 1 and 2 use a variance-preserving scheduler"
        )
    training = config["num_train_timesteps"]
    levels = np.arange(training + 1) / training if flow else angles_from_alphas(scheduler.alphas_cumprod.numpy())
    run = copied.timesteps[skipped_calls(copied, steps, strength) :]
    schedule = np.unique(_flat(run.double().numpy()))
    whole = _close(schedule, np.rint(schedule))
    if not (fractional or whole.all()):
        raise InputError(
            f"{name} has the fractional timestep {schedule[~whole][0]:g}: use a schedule of integer timesteps"
        )
    calibrated = np.where(whole, np.rint(schedule), schedule)  # a scheduler's way from sigma to timestep rounds
    own = calibrated if flow or not whole.all() else _flat(())
    return TimestepTable(name, config, steps, tuple(calibrated.tolist()), levels, flow, own if fractional else None)


def angles_from_alphas(alphas_cumprod: NDArray[np.float64]) -> NDArray[np.float64]:
    """Computes atan2(sigma, alpha), float64 [timesteps], of a variance-preserving noise schedule.

    ``alphas_cumprod`` [timesteps] are its cumulative products of alphas, as diffusers' schedulers have them.
    """
    values = np.asarray(alphas_cumprod, dtype=np.float64)
    return np.arctan2(np.sqrt(1 - values), np.sqrt(values))


def angles_of_timesteps(timesteps: Timesteps, table: TimestepTable) -> NDArray[np.float64]:
    """Computes the noise level float64 [n] of timesteps, fractional ones included, in the unit of ``table.angle``.

    Between two training timesteps log sigma is linear in the timestep, which is how diffusers maps the sigmas of Karras
    and other schedules to timesteps. For flow matching sigma itself is.
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
    """Adds an index for each distinct fractional timestep of the schedules to ``table``.

    For an engine whose time table is an input. Integer timesteps have their indices already.

    Args:
        table: the timesteps that have indices.
        schedules: timesteps of each schedule, in any order.
        covered: refuses timesteps outside ``table.covered``.

    Raises:
        InputError: a timestep is outside the covered range, or no number.
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


def timestep_indices(timesteps: Timesteps, table: TimestepTable, *, covered: bool = True) -> NDArray[np.int64]:
    """Looks up the timestep indices, int64 [n], of scheduler timesteps by their values, to a thousandth of a timestep.

    Args:
        timesteps: float [n].
        table: the timesteps that have indices.
        covered: refuses timesteps outside ``table.covered``.

    Raises:
        InputError: a timestep is outside the covered range, or has no index.
    """
    values = _flat(timesteps)
    indices = known_indices(values, table, covered=covered)
    if (indices < 0).any():
        raise InputError(f"timestep {values[indices < 0][0]:g} is fractional: {_remedy(table)}")
    return indices


def known_indices(timesteps: Timesteps, table: TimestepTable, *, covered: bool = True) -> NDArray[np.int64]:
    """Looks up timestep indices as :func:`timestep_indices` does, -1 for timesteps that have none."""
    values = _flat(timesteps)
    if covered:
        _check_covered(values, table)
    whole = _is_training(values, table)
    indices = np.where(whole, np.rint(values), -1).astype(np.int64)
    if whole.all():
        return indices
    fractional = _flat(()) if table.fractional is None else table.fractional
    if len(fractional):
        nearest = nearest_timesteps(values[~whole], fractional)
        indices[~whole] = np.where(nearest < 0, -1, table.integer_indices + nearest)
    return indices


def nearest_timesteps(timesteps: Timesteps, known: NDArray[np.float64]) -> NDArray[np.int64]:
    """Finds the places of timesteps in ``known`` [>= 1], int64 [n], to a thousandth of a timestep; -1 where none is."""
    gaps = np.abs(_flat(timesteps)[:, None] - known)
    return np.where(gaps.min(1) <= _SAME, gaps.argmin(1), -1)


def scale_origins(timesteps: Timesteps, table: TimestepTable) -> ScaleOrigins:
    """Sorts a schedule's timesteps by where their scales come from."""
    values = np.unique(_flat(timesteps))
    known = np.asarray(table.calibrated, dtype=np.float64)
    calibrated = (np.abs(values[:, None] - known) <= _SAME).any(1)
    clamped = ~calibrated & ((values < known[0]) | (values > known[-1]))
    masks = (calibrated, ~calibrated & ~clamped, clamped)
    return ScaleOrigins(*(tuple(values[mask].tolist()) for mask in masks))


def interpolate_scales(scales: NDArray[np.float32], table: TimestepTable) -> NDArray[np.float32]:
    """Interpolates the scales of calibrated timesteps, [calibrated, quantizers], to float32 [timesteps, quantizers].

    Calibrated timesteps keep their scales bit for bit; between them log scale is linear in the angle; beyond either end
    the scales are clamped to that end's.

    Raises:
        InputError: ``scales`` are not those of the table's calibrated timesteps.
    """
    known = list(table.calibrated_indices)
    if scales.shape[0] != len(known):
        raise InputError(f"scales of {scales.shape[0]} timesteps for {len(known)} calibrated ones")
    interpolated = _interpolate(scales, table, angles_of_timesteps(table.timesteps, table))
    interpolated[known] = scales  # exp(log(s)) is not s to the last bit
    return interpolated


def scales_for_schedule(scales: ScaleTable, own: TimestepTable, bound: TimestepTable) -> ScaleTable:
    """Adds scales for the timesteps that ``bound`` has beyond those of ``own`` to ``scales`` [timesteps, quantizers].

    Present scales keep every bit; the others come from the calibrated ones as in :func:`interpolate_scales`.
    """
    if len(bound) == len(own):
        return scales
    present = timestep_indices(own.timesteps, bound, covered=False)
    interpolated = scales_of_timesteps(bound.timesteps, scales, own)
    interpolated[present] = scales.scales
    return dataclasses.replace(scales, scales=interpolated)


def scales_of_timesteps(timesteps: Timesteps, scales: ScaleTable, own: TimestepTable) -> NDArray[np.float32]:
    """Interpolates the scales of any timesteps, float32 [n, quantizers], from the calibrated ones of ``own``."""
    calibrated = scales.scales[list(own.calibrated_indices)]
    return _interpolate(calibrated, own, angles_of_timesteps(timesteps, own))


def _interpolate(scales: NDArray[np.float32], table: TimestepTable, angles: NDArray[np.float64]) -> NDArray[np.float32]:
    """Interpolates [calibrated, quantizers] to float32 [len(angles), quantizers]."""
    known = angles_of_timesteps(np.asarray(table.calibrated), table)
    logs = np.log(scales.astype(np.float64))
    columns = [np.interp(angles, known, logs[:, quantizer]) for quantizer in range(scales.shape[1])]
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
    """Marks the values that are training timesteps and their own indices."""
    return _close(values, np.rint(values)) & (table.integer_indices > 0)


def _remedy(table: TimestepTable) -> str:
    if table.fractional is None:
        return "this schedule needs an engine exported with --time-table input"
    return "the engine is not bound to this schedule, name its timesteps to load_engine(schedules=...)"


def _close(values: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Compares timesteps elementwise. NaN equals none; infinite values were refused before."""
    close: NDArray[np.bool_] = np.abs(values - others) <= _SAME
    return close


def _flat(timesteps: Timesteps) -> NDArray[np.float64]:
    return np.asarray(timesteps, dtype=np.float64).reshape(-1)
