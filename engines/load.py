"""Engine -> runner: an engine is executable code, so everything is checked first, on the very bytes that are loaded.

An engine that was not built or run here before is loaded and run once in a child process first: it is native code, or a
program for a native parser, and a hostile or damaged one that was sealed anew can crash the process that loads it. The
child takes that crash. What survived is remembered by its manifest's digest in the user's cache, so it costs one more
load, once. It is no sandbox: the child has the user's rights.
"""

from __future__ import annotations

import math
from contextlib import ExitStack, suppress
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.child_process import ChildEndedError, Limits, call
from s2p_deploy.engines.backend import usable_backend
from s2p_deploy.engines.conditioning import text_projections, time_features
from s2p_deploy.engines.joined import joined_runner
from s2p_deploy.engines.lora_bank import LoraBank
from s2p_deploy.engines.lowerings import RECORDED, STATIC
from s2p_deploy.engines.machine import private_folder
from s2p_deploy.engines.options import MOST_TIMESTEPS, shape_at
from s2p_deploy.engines.runner import (
    BOUND,
    OUTPUT,
    BoundRunner,
    BoundTensorRunner,
    RebindingRunner,
    TensorRunner,
    UniformTimestepRunner,
    UniformTimestepTensorRunner,
)
from s2p_deploy.engines.spare_timesteps import SpareTimesteps
from s2p_deploy.errors import InputError, IntegrityError, MissingEnvironmentError
from s2p_deploy.records import Engine, ScaleTable
from s2p_deploy.records.artifacts import verified_files
from s2p_deploy.records.optional_inputs import BOUND_MATRICES
from s2p_deploy.timesteps import scales_for_schedule, scales_of_timesteps, timestep_indices, with_schedules

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from s2p_deploy.engines.backend import Backend
    from s2p_deploy.engines.conditioning import TimeFeatures
    from s2p_deploy.engines.runner import Runner
    from s2p_deploy.records import ComponentEngines, ExportedGraph, TimestepTable
    from s2p_deploy.timesteps import Timesteps

TRIAL_TIMEOUT_S = 900.0
_SPARE_TIMESTEPS = 1024  # beyond those that are bound; far more than requests are drawn at once
_RANGE_SLACK = 1e-6  # relative; a table that went through decimal text
_ROUNDING = {"fp32": 1e-6, "fp16": 2.0**-10}  # of the constant, to the graph's type


def load_engine(
    engine: Engine,
    expected_graph: ExportedGraph | None = None,
    scales: ScaleTable | None = None,
    schedules: Sequence[Timesteps] = (),
    *,
    device: str = "auto",
    tried: bool = False,
) -> BoundRunner:
    """Loads an engine, with everything bound that has a value per timestep.

    Args:
        engine: what to load.
        expected_graph: what it must have been built from.
        scales: the activation scales of the training timesteps; the engine's own where left out.
        schedules: timesteps of schedules that will be run, for which all is computed now. Integer timesteps always
            have an index; fractional ones need an engine that takes time projections as an input, which computes
            what is not named here when it is asked for it.
        device: of a context. An engine for a GPU runs on the one of its index, else on PyTorch's current one.
        tried: load it here without a trial run in a child process, which the trial's own child does.

    Raises:
        IntegrityError: a file was changed, the engine was built from another graph than ``expected_graph``, or it was
            not built here and fails its first trial.
        MissingEnvironmentError: the library is missing or of another version, or the device is.
        InputError: ``scales`` is not a table that this engine takes, or the engine does not run one of ``schedules``.
    """
    if expected_graph is not None:
        check_graph(engine, expected_graph)
    with ExitStack() as opened:
        runner = opened.enter_context(_bound(engine, scales or engine.scales, schedules, device, tried=tried))
        if engine.low_noise is not None:
            inside, own = engine.low_noise, runner.timesteps.fractional
            # only the timesteps that it runs, as it need not be calibrated for the others
            every = [np.asarray(named, np.float64) for named in (*schedules, () if own is None else own)]
            named = [timesteps[timesteps < engine.boundary] for timesteps in every]
            low = _bound(inside, inside.scales, named, device, tried=True, loras=runner.loras)
            runner = joined_runner(runner, opened.enter_context(low), engine.boundary)
        opened.pop_all()
    return runner


def _bound(
    engine: Engine,
    table: ScaleTable,
    schedules: Sequence[Timesteps],
    device: str,
    *,
    tried: bool,
    loras: LoraBank | None = None,
) -> BoundRunner:
    """Loads an engine without the one inside; ``loras`` are those of one with the same branches that runs beside it."""
    backend = usable_backend(engine.backend)
    check_environment(engine, backend, device)
    timesteps = bound_timesteps(engine, schedules)
    check_scales(engine, table)
    if len(table.scales) != len(engine.timesteps):
        raise InputError(
            f"the scale table has {len(table.scales)} timesteps, {engine.folder} has {len(engine.timesteps)}"
        )
    table = scales_for_schedule(table, engine.timesteps, timesteps)
    if not tried:
        require_trial(engine, device)
    features = bound_features(engine, timesteps, schedules)
    files = verified_files(engine)
    spares = 0 if features is None else min(_SPARE_TIMESTEPS, max(0, MOST_TIMESTEPS - len(timesteps)))
    rows = np.concatenate([table.scales, np.repeat(table.scales[-1:], spares, 0)])
    matrices = [spec for spec in engine.inputs if spec.name in BOUND_MATRICES]
    bound: dict[str, NDArray[Any]] = {spec.name: np.zeros(shape_at(spec, {}), spec.dtype) for spec in matrices}
    if any(spec.name == BOUND for spec in engine.inputs):
        bound[BOUND] = rows
    runner: Runner = backend.load(engine, files, bound, device)
    with ExitStack() as opened:
        opened.callback(runner.close)
        spare = None
        if features is not None and spares and isinstance(runner, RebindingRunner):
            spare = _spare_timesteps(engine, timesteps, rows, runner, features)
        if engine.lora is not None and isinstance(runner, RebindingRunner):
            sizes = {name: bound[name].size for name in BOUND_MATRICES}
            if loras is None:
                loras = LoraBank(engine.lora, matrices[0].dtype, sizes, runner.rebind)
            else:
                loras.share(runner.rebind)
        texts = text_projections(engine, loras) if engine.takes_text_projections else None
        opened.pop_all()
    if not engine.mixed_timesteps:
        uniform = UniformTimestepTensorRunner if isinstance(runner, TensorRunner) else UniformTimestepRunner
        runner = uniform(runner)
    per_step = tuple(spec for spec in engine.inputs if spec.name not in bound)
    kind = BoundTensorRunner if isinstance(runner, TensorRunner) else BoundRunner
    adapters: dict[str, Any] = {"loras": loras, "images": engine.images}
    return kind(runner, per_step, timesteps, features, texts, profile=engine.profile, spare=spare, **adapters)


def _spare_timesteps(
    engine: Engine, bound: TimestepTable, rows: NDArray[np.float32], runner: RebindingRunner, features: TimeFeatures
) -> SpareTimesteps:
    """Makes the indices behind the bound ones; ``rows`` are the scales that the runner has, with those to spare."""
    own, names = engine.scales, engine.scales.quantizers
    given = ScaleTable(rows[timestep_indices(engine.timesteps.timesteps, bound, covered=False)], names, own.calibrated)
    takes_scales = any(spec.name == BOUND for spec in engine.inputs)

    def assign(indices: Sequence[int], timesteps: NDArray[np.float64]) -> None:
        if takes_scales:
            rows[list(indices)] = scales_of_timesteps(timesteps, given, engine.timesteps)
            runner.rebind(BOUND, rows)
        features.assign(indices, timesteps)

    return SpareTimesteps(bound, len(rows) - len(bound), assign)


def bound_timesteps(engine: Engine, schedules: Sequence[Timesteps]) -> TimestepTable:
    """Returns the timesteps of an engine that is bound to schedules.

    Raises:
        InputError: a timestep is outside the covered range, or fractional where the time table is constant.
    """
    if engine.takes_time_projections:
        return with_schedules(engine.timesteps, schedules)
    for schedule in schedules:
        timestep_indices(schedule, engine.timesteps)
    return engine.timesteps


def bound_features(engine: Engine, timesteps: TimestepTable, schedules: Sequence[Timesteps]) -> TimeFeatures | None:
    """Opens the projected time features of the bound timesteps; None where the graph computes its own.

    Raises:
        IntegrityError: ``conditioning.onnx`` is missing or was changed.
    """
    if not engine.takes_time_projections:
        return None
    scheduled = np.concatenate([timestep_indices(schedule, timesteps) for schedule in schedules or [[]]])
    ahead = np.unique(scheduled).tolist() or list(timesteps.calibrated_indices)
    return time_features(engine, timesteps.timesteps, ahead)


def check_graph(engine: Engine, graph: ExportedGraph) -> None:
    """Raises IntegrityError where ``engine`` was not built from ``graph``."""
    if engine.manifest.parents["graph"].digest != graph.manifest.digest:
        raise IntegrityError(f"{engine.folder} is an engine of another graph than {graph.folder}: build it again")


def check_environment(engine: Engine | ComponentEngines, backend: Backend, device: str = "auto") -> None:
    """Raises MissingEnvironmentError naming the first thing here that differs from what the engine was built for."""
    here = backend.environment(engine.execution, device)
    for key, built in engine.environment.items():
        if here.get(key) != built:
            raise MissingEnvironmentError(
                f"{engine.folder} needs {key} {built}, here it is {here.get(key, 'missing')}: "
                "use it on such a machine, or make one for this one"
            )


def check_scales(engine: Engine, table: ScaleTable) -> None:
    """Checks that a scale table may be bound to an engine.

    It must have the same quantizers, as many timesteps as the engine takes, and every scale finite, positive and within
    the range that export checked. Columns of quantizers whose lowering is ``static`` must be what the engine has built
    in, within the tolerance that it was built with.

    Raises:
        InputError: it may not; the message names the first quantizer at fault.
    """
    if table.quantizers != engine.scales.quantizers:
        raise InputError(f"the scale table has other quantizers than {engine.folder}: it belongs to another model")
    timesteps = next((spec.shape[0] for spec in engine.inputs if spec.name == BOUND), None)
    if isinstance(timesteps, int) and timesteps != len(table.scales):
        raise InputError(f"the scale table has {len(table.scales)} timesteps, {engine.folder} takes {timesteps}")
    checked = [engine.manifest.content["quantizers"][name] for name in table.quantizers]
    low = np.asarray([quantizer["lowest"] for quantizer in checked]) * (1 - _RANGE_SLACK)
    high = np.asarray([quantizer["highest"] for quantizer in checked]) * (1 + _RANGE_SLACK)
    # written so that NaN fails too
    bad = ~(np.isfinite(table.scales) & (table.scales > 0) & (table.scales >= low) & (table.scales <= high))
    if bad.any():
        index, column = (int(places[0]) for places in np.nonzero(bad))
        raise InputError(
            f"scale of {table.quantizers[column]} at timestep index {index} is {table.scales[index, column]:g}, "
            f"outside {low[column]:g} to {high[column]:g} that export checked: export and build again"
        )
    _check_baked(engine, table)


def _check_baked(engine: Engine, table: ScaleTable) -> None:
    """Raises InputError for a column that differs from the constant in the engine."""
    content = engine.manifest.content
    tolerance = content.get("options", {}).get("static_tolerance", 0.0)
    # the constant is the middle of a range whose ends differ by the tolerance
    within = math.sqrt(1 + tolerance) * (1 + _ROUNDING[engine.dtype])
    for name, column in zip(table.quantizers, table.scales.T, strict=True):
        if content.get(RECORDED, {}).get(name) != STATIC:
            continue
        baked = content["quantizers"][name]["reference_scale"]
        away = np.maximum(column / baked, baked / column)
        if away.max() > within:
            raise InputError(
                f"scale of {name} at timestep index {int(away.argmax())} is {column[away.argmax()]:g}, but "
                f"{engine.folder} has {baked:g} built in (lowering static): build an engine for this table"
            )


def require_trial(engine: Engine, device: str = "auto") -> None:
    """Tries an engine in a child process, on the GPU of a context's device, unless it was built or tried here before.

    Raises:
        IntegrityError: it crashed or failed there.
        MissingEnvironmentError: as loading it would raise, or memory ran out.
    """
    with suppress(MissingEnvironmentError):  # without a usable cache folder, every load tries it again
        if (private_folder("tried") / engine.manifest.digest).is_file():
            return
    message = {"engine": str(engine.folder.resolve()), "digest": engine.manifest.digest, "device": device}
    limits = Limits(TRIAL_TIMEOUT_S)
    try:
        call("s2p_deploy.engines.load:try_in_child", message, limits)
    except ChildEndedError as error:
        reason = error.ended.summary(limits)
        if error.ended.out_of_memory:
            raise MissingEnvironmentError(
                f"{engine.folder}: a trial run in a child process {reason}: free some, or build with a smaller --batch"
            ) from error
        raise IntegrityError(f"{engine.folder}: a trial run in a child process {reason}: build it again") from error
    remember_trial(engine)


def remember_trial(engine: Engine) -> Engine:
    """Notes an engine as one that runs here, and returns it."""
    with suppress(MissingEnvironmentError):
        (private_folder("tried") / engine.manifest.digest).touch()
    return engine


def try_in_child(message: dict[str, Any]) -> dict[str, Any]:
    """Loads an engine and runs it at its smallest and at its tuned batch, in the trial's child process.

    Raises:
        IntegrityError: it is not the engine of the digest, or gives another shape than its manifest says.
    """
    engine = Engine.open(Path(message["engine"]))
    if engine.manifest.digest != message["digest"]:
        raise IntegrityError(f"{engine.folder} was changed while it was opened")
    calibrated, profile = engine.timesteps.calibrated_indices, engine.profile
    indices = {calibrated[0]} if engine.low_noise is None else {calibrated[0], calibrated[-1]}  # one of each engine
    with load_engine(engine, device=message["device"], tried=True) as runner:
        for batch, index in product(sorted({profile.minimum, profile.optimum}), indices):
            shapes = {s.name: [batch if isinstance(size, str) else size for size in s.shape] for s in runner.inputs}
            inputs = {name: np.full(shape, index if name == "timestep_index" else 0) for name, shape in shapes.items()}
            output = runner.infer(inputs)[OUTPUT]
            sizes = {"batch": batch} | dict(zip(("height", "width"), inputs["sample"].shape[2:], strict=False))
            if output.shape != shape_at(engine.outputs[0], sizes):
                raise IntegrityError(f"{engine.folder} gives {OUTPUT} of shape {list(output.shape)}: build it again")
    return {}
