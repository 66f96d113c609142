"""Engine -> runner: an engine is executable code, so everything is checked first, on the very bytes that are loaded."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from s2p_deploy.engines.backend import usable_backend
from s2p_deploy.engines.runner import BoundRunner
from s2p_deploy.errors import InputError, IntegrityError, MissingEnvironmentError

if TYPE_CHECKING:
    from s2p_deploy.engines.backend import Backend
    from s2p_deploy.records import Engine, ExportedGraph, ScaleTable

BOUND = "act_scales"
_RANGE_SLACK = 1e-6  # relative; a table that went through decimal text


def load_engine(
    engine: Engine, expected_graph: ExportedGraph | None = None, scales: ScaleTable | None = None
) -> BoundRunner:
    """A runner of an engine, with the activation scales bound (``scales``, or the engine's own).

    Raises:
        IntegrityError: a file was changed, or the engine was built from another graph than ``expected_graph``.
        MissingEnvironmentError: the library is missing or of another version, or the device is.
        InputError: ``scales`` is not a table that this engine takes.
    """
    if expected_graph is not None:
        check_graph(engine, expected_graph)
    backend = usable_backend(engine.backend)
    check_environment(engine, backend)
    table = scales or engine.scales
    check_scales(engine, table)
    files = _verified_files(engine)
    takes_scales = any(spec.name == BOUND for spec in engine.inputs)
    runner = backend.load(engine, files, {BOUND: table.scales} if takes_scales else {})
    per_step = tuple(spec for spec in engine.inputs if spec.name != BOUND)
    return BoundRunner(runner, per_step, len(table.scales))


def check_graph(engine: Engine, graph: ExportedGraph) -> None:
    """Raises IntegrityError where ``engine`` was not built from ``graph``."""
    if engine.manifest.parents["graph"].digest != graph.manifest.digest:
        raise IntegrityError(f"{engine.folder} is an engine of another graph than {graph.folder}: build it again")


def check_environment(engine: Engine, backend: Backend) -> None:
    """Raises MissingEnvironmentError naming the first thing here that differs from what the engine was built for."""
    here = backend.environment()
    for key, built in engine.environment.items():
        if here.get(key) != built:
            raise MissingEnvironmentError(
                f"{engine.folder} needs {key} {built}, here it is {here.get(key, 'missing')}: "
                "use it on such a machine, or build an engine for this one"
            )


def check_scales(engine: Engine, table: ScaleTable) -> None:
    """Whether a scale table may be bound.

    It must have the same points, as many rows as the engine takes, and every scale finite, positive and within the
    range that export checked.

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


def _verified_files(engine: Engine) -> dict[str, bytearray]:
    return {name: _verified(engine, name) for name in engine.engine_files}


def _verified(engine: Engine, name: str) -> bytearray:
    path = engine.folder / name
    data = bytearray(path.stat().st_size)
    with path.open("rb") as opened:
        opened.readinto(data)
    if hashlib.sha256(data).hexdigest() != engine.manifest.files.get(name):
        raise IntegrityError(f"{path} was changed after it was written: build the engine again")
    return data
