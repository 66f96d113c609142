"""Activation scales without a look at activations: a documented default, or those of another calibrated model."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from s2p_deploy.errors import InputError
from s2p_deploy.numerics import format_by_name
from s2p_deploy.records import ScaleTable
from s2p_deploy.timesteps import rows_of_timesteps, scales_of_rows, spread_over_rows, with_schedules

if TYPE_CHECKING:
    from s2p_deploy.records import ActPoint, CalibratedModel, PrecisionPlan, TimestepTable

DEFAULT_PEAK = 4.0  # standard deviations of a unit normal activation that are not clipped, next to the picture
DEFAULT_RISE = 0.25  # by how much more at the noisiest timestep: real scales vary, and constant ones make other engines


def default_scales(plan: PrecisionPlan, timesteps: TimestepTable) -> ScaleTable:
    """The scales of every row, as if all activations were unit normal.

    ``DEFAULT_PEAK / qmax`` next to the picture, rising linearly with the timestep by ``DEFAULT_RISE``; points that do
    not depend on the timestep stay at the first. Engines get their real size and speed from them, and no pictures.
    """
    share = np.asarray(timesteps.calibrated) / (len(timesteps.angle) - 1)
    columns = [_peak(point) * (1 + DEFAULT_RISE * share * point.timestep_dependent) for point in plan.act_points]
    calibrated = np.stack(columns, 1) if columns else np.ones((len(share), 0))
    scales = spread_over_rows(calibrated.astype(np.float32), timesteps)
    return ScaleTable(scales, plan.point_names(), timesteps.calibrated_rows)


def given_scales(
    plan: PrecisionPlan, timesteps: TimestepTable, given: CalibratedModel
) -> tuple[ScaleTable, TimestepTable]:
    """The scales of another model's act points of the same names; its rows count as calibrated, not the schedule's.

    ``timesteps`` is the schedule of this model; what it has and the other has not gets a row.

    Raises:
        InputError: the other model has another noise schedule, lacks an act point or has it in another format, exists
            in simulation only, or was not calibrated for timesteps of this schedule.
    """
    if given.simulation is not None:
        raise InputError(f"cannot take activation scales from {given.folder}: it exists in simulation only")
    own, other = timesteps, given.timesteps
    if own.flow_matching != other.flow_matching or not _equal(own.angle, other.angle):
        raise InputError(f"cannot take activation scales from {given.folder}: its noise levels are of another schedule")
    _check_points(plan, given)
    known = dataclasses.replace(
        own, calibrated=other.calibrated, fractional=None if own.fractional is None else other.fractional
    )
    bound = known if own.fractional is None else with_schedules(known, [own.calibrated])
    rows_of_timesteps(own.calibrated, bound)  # refuses what the other does not cover
    scales = scales_of_rows(given.scales, other, bound).scales
    columns = [given.scales.points.index(name) for name in plan.point_names()]
    return ScaleTable(np.ascontiguousarray(scales[:, columns]), plan.point_names(), bound.calibrated_rows), bound


def _check_points(plan: PrecisionPlan, given: CalibratedModel) -> None:
    formats = {point.name: point.activations for point in given.plan.act_points}
    for point in plan.act_points:
        found = formats.get(point.name, "nothing")
        if found != point.activations:
            raise InputError(
                f"{given.folder} has {found} for act point {point.name}, which needs {point.activations} scales:"
                " give a model calibrated with the same formats"
            )


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and bool(np.allclose(one, other, rtol=0, atol=1e-6))


def _peak(point: ActPoint) -> float:
    fmt = format_by_name(point.activations)
    assert fmt is not None, "act points are quantized"
    return DEFAULT_PEAK / fmt.qmax
