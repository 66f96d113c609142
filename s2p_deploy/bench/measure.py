"""Stage: engines and the floating-point engine, each in a process of its own, measured in turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.bench.result import BenchResult, EngineFigures, GainGate, Memory, Ratios, this_machine
from s2p_deploy.bench.turns import Child, children, in_turns
from s2p_deploy.context import Context
from s2p_deploy.engines import usable_backend
from s2p_deploy.engines.lowerings import UNKNOWN
from s2p_deploy.errors import InputError, MissingEnvironmentError
from s2p_deploy.metrics import median_of, picks, quantile_of, resampled
from s2p_deploy.recipe import Bench, recipe_from_data
from s2p_deploy.records.artifacts import bytes_of_artifact

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from s2p_deploy.context import Progress
    from s2p_deploy.families import BasePipeline
    from s2p_deploy.recipe import Recipe
    from s2p_deploy.records import Engine, Number

STEPS_PER_ROUND = 3
WORKER = ("-m", "s2p_deploy.bench.worker")


@dataclass(frozen=True)
class Load:
    """The amount of work: samples per step, rounds, and pictures per engine (0: none) of ``steps`` steps each.

    ``steps`` None: those of the first engine's recipe.
    """

    batch: int = 2
    rounds: int = 10
    pictures: int = 3
    steps: int | None = None


def bench(
    engines: Sequence[Engine],
    against: Engine,
    load: Load,
    *,
    base: BasePipeline | None = None,
    limits: Bench | None = None,
    context: Context = Context(),
) -> BenchResult:
    """Measures engines and the floating-point engine in one run.

    Every engine is loaded in a process of its own and stays there. In each round every engine runs one step unmeasured
    and then some measured ones, while the others wait; pictures are generated in turns too. Other load on the machine
    then meets all of them alike, and ratios hold better than times.

    Args:
        engines: what to measure.
        against: the engine of recipe ``fp`` of the same backend, precision, provider, optimization and pipeline.
        load: how much.
        base: the floating-point pipeline, needed for pictures.
        limits: what every engine must gain, in place of what its own recipe says; null leaves that limit to the recipe.
        context: progress, told about every engine loaded, round and picture.

    Raises:
        InputError: ``against`` does not fit, or the engines do not take that batch or so many steps.
        MissingEnvironmentError: the engines cannot run here.
        S2PError: a process crashed.
    """
    check_comparable(engines, against)
    every = (against, *engines)
    recipe = _recipe(engines[0])
    steps = load.steps or recipe.sampling.steps
    generation = _generation(base, recipe, steps, every) if base is not None and load.pictures else None
    samples = _measured(every, load, generation, context.progress)
    baseline = (against, samples[0])
    return BenchResult(
        machine=this_machine(),
        backend=against.backend,
        precision=against.precision,
        provider=against.provider,
        optimization=against.optimization,
        batch=load.batch,
        rounds=load.rounds,
        steps_per_round=STEPS_PER_ROUND,
        pictures=load.pictures if generation else 0,
        sampling_steps=steps,
        baseline=figures_of(*baseline, None),
        engines=tuple(
            with_gates(figures_of(engine, own, baseline), gain_limits(engine, limits or Bench()))
            for engine, own in zip(engines, samples[1:], strict=True)
        ),
    )


def check_comparable(engines: Sequence[Engine], against: Engine) -> None:
    """Checks that ``against`` is the floating-point engine of the others' pipeline, run as they are, and runs here.

    Raises:
        InputError: it is not. MissingEnvironmentError: the backend is missing, or its engines do not run here.
    """
    recipe = _recipe(against)
    if not recipe.is_float:
        raise InputError(f"--against {against.folder} is of recipe {recipe.name}: give an engine of recipe fp")
    for engine in engines:
        if (engine.backend, engine.execution) != (against.backend, against.execution):
            raise InputError(
                f"{engine.folder} is for {engine.backend} with {engine.execution}, --against {against.folder} for "
                f"{against.backend} with {against.execution}: build one like the other"
            )
        if engine.manifest.base.digest != against.manifest.base.digest:
            raise InputError(f"{engine.folder} and --against {against.folder} are of different pipelines")
    if not usable_backend(against.backend).capabilities().executes:
        raise MissingEnvironmentError(
            f"engines of {against.backend} do not run on this machine: measure them where doctor says that they do"
        )


def load_request(engine: Engine) -> dict[str, str]:
    """Names the engine that a child loads."""
    return {"engine": str(engine.folder.resolve()), "digest": engine.manifest.digest}


def _recipe(engine: Engine) -> Recipe:
    return recipe_from_data(engine.manifest.recipe, str(engine.folder))


def _generation(base: BasePipeline, recipe: Recipe, steps: int, engines: Sequence[Engine]) -> dict[str, Any]:
    """Describes how a child generates pictures; the same for all engines.

    Raises:
        InputError: the scheduler has no such schedule, or an engine does not run it.
    """
    from s2p_deploy.pipeline import Schedule, schedules_to_bind  # and with them diffusers

    strength = recipe.sampling.strength or base.default_strength
    schedule = Schedule(steps, strength=strength)
    (timesteps,) = {tuple(schedules_to_bind(engine, base, [schedule])[0].tolist()) for engine in engines}
    return {
        "timesteps": timesteps,
        "folder": str(base.folder),
        "source": base.base.source,
        "digest": base.base.digest,
        "guidance_scale": recipe.sampling.guidance(base.default_guidance),
        "pipeline_class": base.pipeline_class,
        "max_sequence_length": recipe.sampling.max_sequence_length,
        "steps": steps,
        "strength": strength,
    }


def _measured(
    engines: Sequence[Engine], load: Load, generation: dict[str, Any] | None, progress: Progress
) -> list[Samples]:
    with children([(str(engine.folder), WORKER) for engine in engines]) as processes:
        loaded = _loaded(processes, engines, load.batch, generation, progress)
        steps, after = _rounds(processes, load.rounds, progress)
        pictures = _pictures(processes, load.pictures, progress) if generation else [[] for _ in processes]
    return [
        Samples(
            load=loaded[i]["seconds"],
            steps=np.asarray(steps[i]),
            pictures=tuple(pictures[i]),
            memory=Memory(
                before=loaded[i]["before"],
                loaded=loaded[i]["loaded"],
                steady=after[i]["rss"],
                peak=after[i]["peak"],
            ),
        )
        for i in range(len(engines))
    ]


def _loaded(
    processes: Sequence[Child],
    engines: Sequence[Engine],
    batch: int,
    generation: dict[str, Any] | None,
    progress: Progress,
) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = []
    for child, engine in zip(processes, engines, strict=True):  # one at a time: loading uses all cores
        progress("load", len(answers), len(engines))
        answers.append(child.request("load", **load_request(engine), batch=batch, generation=generation))
    progress("load", len(answers), len(engines))
    return answers


def _rounds(
    processes: Sequence[Child], rounds: int, progress: Progress
) -> tuple[list[list[list[float]]], list[dict[str, Any]]]:
    """Measures seconds [engine][round][step], and every engine's memory after its last round."""
    seconds: list[list[list[float]]] = [[] for _ in processes]
    after: list[dict[str, Any]] = [{} for _ in processes]

    def visit(member: int, _round: int) -> None:
        after[member] = processes[member].request("steps", count=STEPS_PER_ROUND)
        seconds[member].append(after[member]["seconds"])
        progress("measure steps", sum(map(len, seconds)), rounds * len(processes))

    in_turns(len(processes), rounds, visit)
    return seconds, after


def _pictures(processes: Sequence[Child], pictures: int, progress: Progress) -> list[list[float]]:
    """Measures seconds [engine][picture]."""
    for child in processes:
        child.request("pipeline")
    seconds: list[list[float]] = [[] for _ in processes]

    def visit(member: int, number: int) -> None:
        seconds[member].append(processes[member].request("picture", number=number)["seconds"])
        progress("draw pictures", sum(map(len, seconds)), pictures * len(processes))

    in_turns(len(processes), pictures, visit)
    return seconds


@dataclass(frozen=True)
class Samples:
    """Seconds of one engine: until the first step's result, of steps [rounds, steps], of pictures; and its memory."""

    load: float
    steps: NDArray[np.float64]
    pictures: tuple[float, ...]
    memory: Memory


def figures_of(engine: Engine, own: Samples, baseline: tuple[Engine, Samples] | None) -> EngineFigures:
    """Computes one engine's figures, with ratios to the baseline's; None: it is the baseline."""
    pictures = median_of(np.asarray(own.pictures)) if own.pictures else None
    return EngineFigures(
        name=engine.folder.resolve().name,
        digest=engine.manifest.digest,
        recipe=str(engine.manifest.recipe["name"]),
        size=size_on_disk(engine),
        load_seconds=own.load,
        memory=own.memory,
        step_p50=median_of(own.steps.flatten()),
        step_p95=quantile_of(own.steps.flatten(), 0.95),
        picture_seconds=pictures,
        images_per_minute=60 / pictures.value if pictures else None,
        ratios=_ratios(engine, own, *baseline) if baseline else None,
        int8_share=int8_share(engine),
    )


def int8_share(engine: Engine) -> float | None:
    """Computes the share of quantized layers that the backend reports to compute in INT8; None: it reports nothing.

    Of joined engines it is that of the first one.
    """
    quantized = [layer for layer in engine.layers if layer.activation_bits <= 8 and layer.weight_storage_bits <= 8]
    reported = [layer.compute for layer in quantized if layer.compute != UNKNOWN]
    return sum(compute == "int8" for compute in reported) / len(quantized) if reported else None


def gain_limits(engine: Engine, given: Bench) -> Bench:
    """Returns the ``given`` limits, and those of the engine's recipe where none is given."""
    return _recipe(engine).bench.model_copy(update=given.model_dump(exclude_none=True))


def with_gates(figures: EngineFigures, limits: Bench) -> EngineFigures:
    """Judges an engine's figures by the limits that are switched on."""
    assert figures.ratios is not None, "the baseline is not judged"
    step = figures.ratios.step
    speedup = 1 / (step.value if step.high is None else step.high)  # one round has no interval
    measured = (("speedup", limits.speedup, speedup), ("int8_share", limits.int8_share, figures.int8_share))
    gates = tuple(
        GainGate(name=name, limit=limit, value=value, passed=value is not None and value >= limit)
        for name, limit, value in measured
        if limit is not None
    )
    return figures.model_copy(update={"gates": gates})


def _ratios(engine: Engine, own: Samples, against: Engine, baseline: Samples) -> Ratios:
    faster = ratio_of_medians(_column(baseline.pictures), _column(own.pictures)) if own.pictures else None
    return Ratios(
        step=ratio_of_medians(own.steps, baseline.steps),
        images_per_minute=faster,
        load=own.load / baseline.load,
        steady_memory=own.memory.steady / baseline.memory.steady,
        peak_memory=own.memory.peak / baseline.memory.peak,
        size=size_on_disk(engine) / size_on_disk(against),
    )


def ratio_of_medians(times: NDArray[np.float64], reference: NDArray[np.float64]) -> Number:
    """Computes the median of times [rounds, n] over that of the reference's [rounds, n].

    The interval resamples rounds, both sides' alike: what slowed a round slowed it for both.
    """
    rounds = picks(len(times))
    resamples = [np.median(values[rounds].reshape(len(rounds), -1), axis=1) for values in (times, reference)]
    return resampled(float(np.median(times) / np.median(reference)), times.size, resamples[0] / resamples[1])


def size_on_disk(engine: Engine) -> int:
    """Counts the bytes of an engine's files, its manifest left out."""
    return bytes_of_artifact(engine)


def _column(values: Sequence[float]) -> NDArray[np.float64]:
    return np.asarray(values, np.float64)[:, None]
