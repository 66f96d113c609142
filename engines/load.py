"""Engine -> runner: an engine is executable code, so everything is checked first, on the very bytes that are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from s2p_deploy.engines.backend import usable_backend
from s2p_deploy.engines.bound_scales import BOUND, check_scales
from s2p_deploy.engines.conditioning import time_features
from s2p_deploy.engines.lowerings import MIXED_ROWS
from s2p_deploy.engines.one_row import OneRowRunner
from s2p_deploy.engines.options import ShapeProfile
from s2p_deploy.engines.runner import BoundRunner
from s2p_deploy.engines.tensor_runner import BoundTensorRunner, TensorRunner
from s2p_deploy.engines.text_projections import text_projections
from s2p_deploy.engines.trial import require_trial
from s2p_deploy.engines.verified_bytes import verified_files
from s2p_deploy.errors import InputError, IntegrityError, MissingEnvironmentError
from s2p_deploy.timesteps import rows_of_timesteps, scales_of_rows, with_schedules

if TYPE_CHECKING:
    from collections.abc import Sequence

    from s2p_deploy.engines.backend import Backend
    from s2p_deploy.engines.conditioning import TimeFeatures
    from s2p_deploy.engines.runner import Runner
    from s2p_deploy.records import Engine, ExportedGraph, ScaleTable, TimestepTable
    from s2p_deploy.records.pipeline_parts import PipelineParts
    from s2p_deploy.timesteps import Timesteps


def load_engine(
    engine: Engine,
    expected_graph: ExportedGraph | None = None,
    scales: ScaleTable | None = None,
    schedules: Sequence[Timesteps] = (),
    *,
    tried: bool = False,
) -> BoundRunner:
    """A runner of an engine, with everything bound that has rows.

    Args:
        engine: what to load.
        expected_graph: what it must have been built from.
        scales: the activation scales of the training timesteps; the engine's own where left out.
        schedules: timesteps of every schedule that will be asked for. Integer timesteps always have rows; fractional
            ones only where they are named here, on an engine of the input form.
        tried: load it here without a trial run in a child process, which the trial's own child does.

    Raises:
        IntegrityError: a file was changed, the engine was built from another graph than ``expected_graph``, or it was
            not built here and fails its first trial.
        MissingEnvironmentError: the library is missing or of another version, or the device is.
        InputError: ``scales`` is not a table that this engine takes, or the engine does not run one of ``schedules``.
    """
    if expected_graph is not None:
        check_graph(engine, expected_graph)
    backend = usable_backend(engine.backend)
    check_environment(engine, backend)
    timesteps = bound_timesteps(engine, schedules)
    table = scales or engine.scales
    check_scales(engine, table)
    if len(table.scales) != engine.timesteps.rows:
        raise InputError(f"the scale table has {len(table.scales)} rows, {engine.folder} has {engine.timesteps.rows}")
    table = scales_of_rows(table, engine.timesteps, timesteps)
    if not tried:
        require_trial(engine)
    features = bound_features(engine, timesteps, schedules)
    texts = text_projections(engine) if engine.takes_text_projections else None
    files = verified_files(engine)
    takes_scales = any(spec.name == BOUND for spec in engine.inputs)
    runner: Runner = backend.load(engine, files, {BOUND: table.scales} if takes_scales else {})
    if not engine.manifest.content.get(MIXED_ROWS, True):
        runner = OneRowRunner(runner)
    per_step = tuple(spec for spec in engine.inputs if spec.name != BOUND)
    kind = BoundTensorRunner if isinstance(runner, TensorRunner) else BoundRunner
    profile = ShapeProfile.from_json(engine.manifest.content["profile"])
    return kind(runner, per_step, timesteps, features, texts, profile=profile)


def bound_timesteps(engine: Engine, schedules: Sequence[Timesteps]) -> TimestepTable:
    """The rows of an engine that is bound to schedules.

    Raises:
        InputError: a timestep is outside the covered range, or fractional where the time table is constant.
    """
    if engine.takes_time_projections:
        return with_schedules(engine.timesteps, schedules)
    for schedule in schedules:
        rows_of_timesteps(schedule, engine.timesteps)
    return engine.timesteps


def bound_features(engine: Engine, timesteps: TimestepTable, schedules: Sequence[Timesteps]) -> TimeFeatures | None:
    """Projected time features of the bound rows, those of ``schedules`` ahead; None where the graph has its own.

    Raises:
        IntegrityError: ``conditioning.onnx`` is missing or was changed.
    """
    if not engine.takes_time_projections:
        return None
    asked = np.concatenate([rows_of_timesteps(schedule, timesteps) for schedule in schedules or [[]]])
    ahead = np.unique(asked).tolist() or list(timesteps.calibrated_rows)
    return time_features(engine, timesteps.timesteps, ahead)


def check_graph(engine: Engine, graph: ExportedGraph) -> None:
    """Raises IntegrityError where ``engine`` was not built from ``graph``."""
    if engine.manifest.parents["graph"].digest != graph.manifest.digest:
        raise IntegrityError(f"{engine.folder} is an engine of another graph than {graph.folder}: build it again")


def check_environment(engine: Engine | PipelineParts, backend: Backend) -> None:
    """Raises MissingEnvironmentError naming the first thing here that differs from what the engine was built for."""
    here = backend.environment(engine.hint)
    for key, built in engine.environment.items():
        if here.get(key) != built:
            raise MissingEnvironmentError(
                f"{engine.folder} needs {key} {built}, here it is {here.get(key, 'missing')}: "
                "use it on such a machine, or make one for this one"
            )
