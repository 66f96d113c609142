"""Whether a scale table may be bound to an engine."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from s2p_deploy.engines.lowerings import RECORDED, STATIC
from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from s2p_deploy.records import Engine, ScaleTable

BOUND = "act_scales"
_RANGE_SLACK = 1e-6  # relative; a table that went through decimal text
_ROUNDING = {"fp32": 1e-6, "fp16": 2.0**-10}  # of the constant, to the graph's type


def check_scales(engine: Engine, table: ScaleTable) -> None:
    """Whether a scale table may be bound.

    It must have the same points, as many rows as the engine takes, and every scale finite, positive and within the
    range that export checked. Columns of points whose lowering is ``static`` must be what the engine has built in,
    within the tolerance that it was built with.

    Raises:
        InputError: it may not; the message names the first point at fault.
    """
    if table.points != engine.scales.points:
        raise InputError(f"the scale table has other points than {engine.folder}: it belongs to another model")
    rows = next((spec.shape[0] for spec in engine.inputs if spec.name == BOUND), None)
    if isinstance(rows, int) and rows != len(table.scales):
        raise InputError(f"the scale table has {len(table.scales)} rows, {engine.folder} takes {rows}")
    checked = [engine.manifest.content["points"][name] for name in table.points]
    low = np.asarray([point["lowest"] for point in checked]) * (1 - _RANGE_SLACK)
    high = np.asarray([point["highest"] for point in checked]) * (1 + _RANGE_SLACK)
    # written so that NaN fails too
    bad = ~(np.isfinite(table.scales) & (table.scales > 0) & (table.scales >= low) & (table.scales <= high))
    if bad.any():
        row, column = (int(index[0]) for index in np.nonzero(bad))
        raise InputError(
            f"scale of {table.points[column]} at row {row} is {table.scales[row, column]:g}, "
            f"outside {low[column]:g} to {high[column]:g} that export checked: export and build again"
        )
    _check_baked(engine, table)


def _check_baked(engine: Engine, table: ScaleTable) -> None:
    """Raises InputError for a column that differs from the constant in the engine."""
    content = engine.manifest.content
    tolerance = content.get("options", {}).get("static_tolerance", 0.0)
    # the constant is the middle of a range whose ends differ by the tolerance
    within = math.sqrt(1 + tolerance) * (1 + _ROUNDING[engine.dtype])
    for name, column in zip(table.points, table.scales.T, strict=True):
        if content.get(RECORDED, {}).get(name) != STATIC:
            continue
        baked = content["points"][name]["centre"]
        away = np.maximum(column / baked, baked / column)
        if away.max() > within:
            raise InputError(
                f"scale of {name} at row {int(away.argmax())} is {column[away.argmax()]:g}, but {engine.folder} has "
                f"{baked:g} built in (lowering static): build an engine for this table"
            )
