"""What an engine or graph carries from the calibrated model as numbers: scales, time features, products of the text.

Each is compared with the calibrated model's own, row by row: a table that belongs to another schedule, or is shifted,
may leave every product of the network right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from s2p_deploy.validation.latents import branch_of
from s2p_deploy.validation.measurements import TableGap
from s2p_deploy.validation.reference import reference_calls

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from s2p_deploy.calib import FakeQuantDenoiser
    from s2p_deploy.engines import BoundRunner, EngineParts
    from s2p_deploy.families import Tap
    from s2p_deploy.records import CalibratedModel, ScaleTable
    from s2p_deploy.validation.latents import ValidationLatents

TIME_TABLE = "time_projections"


def scale_gap(name: str, table: ScaleTable, expected: ScaleTable) -> TableGap:
    """Of two scale tables; without a number where they are not of one shape and the same act points."""
    if table.points != expected.points or table.scales.shape != expected.scales.shape:
        return TableGap("scales", name, float("nan"), "other act points or rows", expected.scales.size)
    if not expected.scales.size:
        return TableGap("scales", name, 0.0, "", 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = np.abs(table.scales.astype(np.float64) / expected.scales - 1)
    row, point = np.unravel_index(_largest(gap), gap.shape)
    return TableGap("scales", name, float(gap[row, point]), f"{table.points[point]}, row {row}", gap.size)


def constant_time_gap(name: str, parts: EngineParts, calibrated: CalibratedModel, *, half: bool) -> TableGap | None:
    """Of the constant time table, where there is one."""
    found = parts.constant(TIME_TABLE)
    return None if found is None else _row_gap(name, found, calibrated.time_table().projections, half=half)


def given_time_gap(
    name: str, engine: BoundRunner, fake_quant: FakeQuantDenoiser, latents: ValidationLatents, *, half: bool
) -> TableGap | None:
    """Of the time features that an engine is given as an input, at the latents' rows; None where it is given none."""
    if engine.features is None:
        return None
    rows, added = torch.from_numpy(latents.rows), torch.from_numpy(latents.added_cond)
    with torch.no_grad():
        expected = fake_quant.denoiser.hot.time(rows, added).numpy()
    found = engine.features.of(latents.rows, latents.added_cond if latents.added_cond.shape[1] else None)
    return _row_gap(name, found, expected, half=half, rows=latents.rows)


def text_gap(
    name: str,
    engine: BoundRunner,
    fake_quant: FakeQuantDenoiser,
    latents: ValidationLatents,
    taps: tuple[Tap, ...],
    *,
    half: bool,
) -> TableGap | None:
    """Of the products of the text that an engine is given as an input; None where it is given none."""
    if engine.texts is None:
        return None
    gaps = [
        _gaps(engine.texts.of(call.latents.text.astype(engine.texts.spec.dtype)), _joined(call.seen, taps))
        for call in reference_calls(fake_quant, latents, taps)
    ]
    gap = np.concatenate(gaps)
    worst = _largest(gap)
    return TableGap("text", name, float(gap[worst]), branch_of(worst), len(gap), half)


def _row_gap(
    name: str,
    found: NDArray[np.floating],
    expected: NDArray[np.float32],
    *,
    half: bool,
    rows: NDArray[np.int64] | None = None,
) -> TableGap:
    if found.shape != expected.shape:
        return TableGap("time", name, float("nan"), f"shape {list(found.shape)}", len(expected), half)
    gap = _gaps(found, expected)
    worst = _largest(gap)
    row = worst if rows is None else int(rows[worst])
    return TableGap("time", name, float(gap[worst]), f"row {row}", len(gap), half)


def _gaps(found: NDArray[np.floating], expected: NDArray[np.float32]) -> NDArray[np.float64]:
    """Relative error float64 [n] of every sample of [n, ...]."""
    wanted = expected.reshape(len(expected), -1).astype(np.float64)
    error = np.linalg.norm(found.reshape(len(found), -1) - wanted, axis=1)
    gaps: NDArray[np.float64] = error / np.maximum(np.linalg.norm(wanted, axis=1), np.finfo(np.float64).tiny)
    return gaps


def _joined(seen: dict[Tap, NDArray[np.float32]], taps: tuple[Tap, ...]) -> NDArray[np.float32]:
    return np.concatenate([seen[tap] for tap in taps], -1)


def _largest(values: NDArray[np.float64]) -> int:
    """Where the largest is; what is no number is larger than any."""
    return int(np.where(np.isnan(values), np.inf, values).argmax())
