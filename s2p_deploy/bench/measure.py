"""The stage: engines and the floating-point engine, each in its own process, measured in turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.bench.figures import Samples, figures_of
from s2p_deploy.bench.machine import this_machine
from s2p_deploy.bench.result import BenchResult, Memory
from s2p_deploy.bench.turns import Child, children, in_turns
from s2p_deploy.engines import usable_backend
from s2p_deploy.errors import InputError, MissingEnvironmentError
from s2p_deploy.progress import Progress, silent
from s2p_deploy.recipe import recipe_from_data

if TYPE_CHECKING:
    from collections.abc import Sequence

    from s2p_deploy.families import BasePipeline
    from s2p_deploy.recipe import Recipe
    from s2p_deploy.records import Engine

STEPS_PER_ROUND = 3
WORKER = ("-m", "s2p_deploy.bench.worker")


@dataclass(frozen=True)
class Load:
    """How much is measured: samples per step, rounds, and pictures per engine (0: none) of ``steps`` steps each.

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
    progress: Progress = silent,
) -> BenchResult:
    """Measures engines and the floating-point engine in one run.

    Every engine is loaded in a process of its own and stays there. In each round every engine runs one step unmeasured
    and then some measured ones, while the others wait; pictures are drawn in turns too. So what else the machine does
    meets all of them alike, and ratios hold better than times.

    Args:
        engines: what to measure.
        against: the same backend's and hint's engine of recipe ``fp``, of the same pipeline.
        load: how much.
        base: the floating-point pipeline, needed for pictures.
        progress: told about every engine loaded, round and picture.

    Raises:
        InputError: ``against`` does not fit, or the engines do not take that batch.
        MissingEnvironmentError: the engines cannot run here.
        S2PError: a process crashed.
    """
    check_comparable(engines, against)
    every = (against, *engines)
    recipe = _recipe(engines[0])
    steps = load.steps or recipe.sampling.steps
    drawing = _drawing(base, recipe, steps) if base is not None and load.pictures else None
    samples = _measured(every, load, drawing, progress)
    baseline = (against, samples[0])
    return BenchResult(
        machine=this_machine(),
        backend=against.backend,
        hint=against.hint,
        batch=load.batch,
        rounds=load.rounds,
        steps_per_round=STEPS_PER_ROUND,
        pictures=load.pictures if drawing else 0,
        sampling_steps=steps,
        baseline=figures_of(*baseline, None),
        engines=tuple(figures_of(engine, own, baseline) for engine, own in zip(engines, samples[1:], strict=True)),
    )


def check_comparable(engines: Sequence[Engine], against: Engine) -> None:
    """Whether ``against`` is the floating-point engine of all the others' backend, hint and pipeline, and runs here.

    Raises:
        InputError: it is not. MissingEnvironmentError: the backend is missing, or its engines do not run here.
    """
    recipe = _recipe(against)
    if not recipe.is_float:
        raise InputError(f"--against {against.folder} is of recipe {recipe.name}: give an engine of recipe fp")
    for engine in engines:
        if (engine.backend, engine.hint) != (against.backend, against.hint):
            raise InputError(
                f"{engine.folder} is for {engine.backend} with hint {engine.hint}, --against {against.folder} for "
                f"{against.backend} with hint {against.hint}: build one like the other"
            )
        if engine.manifest.base.digest != against.manifest.base.digest:
            raise InputError(f"{engine.folder} and --against {against.folder} are of different pipelines")
    if not usable_backend(against.backend).capabilities().executes:
        raise MissingEnvironmentError(
            f"engines of {against.backend} do not run on this machine: measure them where doctor says that they do"
        )


def load_request(engine: Engine) -> dict[str, str]:
    """How a child is told which engine to load."""
    return {"engine": str(engine.folder.resolve()), "digest": engine.manifest.digest}


def _recipe(engine: Engine) -> Recipe:
    return recipe_from_data(engine.manifest.recipe, str(engine.folder))


def _drawing(base: BasePipeline, recipe: Recipe, steps: int) -> dict[str, Any]:
    """What a child needs to draw; the same for all engines."""
    return {
        "folder": str(base.folder),
        "source": base.base.source,
        "digest": base.base.digest,
        "guidance_scale": recipe.sampling.guidance_scale or base.default_guidance,
        "pipeline_class": base.pipeline_class,
        "max_sequence_length": recipe.sampling.max_sequence_length,
        "steps": steps,
    }


def _measured(
    engines: Sequence[Engine], load: Load, drawing: dict[str, Any] | None, progress: Progress
) -> list[Samples]:
    with children([(str(engine.folder), WORKER) for engine in engines]) as asked:
        loaded = _loaded(asked, engines, load.batch, drawing, progress)
        steps, after = _rounds(asked, load.rounds, progress)
        pictures = _pictures(asked, load.pictures, progress) if drawing else [[] for _ in asked]
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
    asked: Sequence[Child], engines: Sequence[Engine], batch: int, drawing: dict[str, Any] | None, progress: Progress
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for child, engine in zip(asked, engines, strict=True):  # one at a time: loading uses all cores
        progress("load", len(found), len(engines))
        found.append(child.ask("load", **load_request(engine), batch=batch, drawing=drawing))
    progress("load", len(found), len(engines))
    return found


def _rounds(
    asked: Sequence[Child], rounds: int, progress: Progress
) -> tuple[list[list[list[float]]], list[dict[str, Any]]]:
    """Seconds [engine][round][step], and every engine's memory after its last round."""
    seconds: list[list[list[float]]] = [[] for _ in asked]
    after: list[dict[str, Any]] = [{} for _ in asked]

    def visit(member: int, _round: int) -> None:
        after[member] = asked[member].ask("steps", count=STEPS_PER_ROUND)
        seconds[member].append(after[member]["seconds"])
        progress("measure steps", sum(map(len, seconds)), rounds * len(asked))

    in_turns(len(asked), rounds, visit)
    return seconds, after


def _pictures(asked: Sequence[Child], pictures: int, progress: Progress) -> list[list[float]]:
    """Seconds [engine][picture]."""
    for child in asked:
        child.ask("pipeline")
    seconds: list[list[float]] = [[] for _ in asked]

    def visit(member: int, number: int) -> None:
        seconds[member].append(asked[member].ask("picture", number=number)["seconds"])
        progress("draw pictures", sum(map(len, seconds)), pictures * len(asked))

    in_turns(len(asked), pictures, visit)
    return seconds
