"""Engine -> runner: an engine is executable code, so everything is checked first, on the very bytes that are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from s2p_deploy.engines.backend import usable_backend
from s2p_deploy.engines.bound_scales import BOUND, check_scales
from s2p_deploy.engines.runner import BoundRunner
from s2p_deploy.engines.verified_bytes import verified_files
from s2p_deploy.errors import IntegrityError, MissingEnvironmentError

if TYPE_CHECKING:
    from s2p_deploy.engines.backend import Backend
    from s2p_deploy.records import Engine, ExportedGraph, ScaleTable


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
    files = verified_files(engine)
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
