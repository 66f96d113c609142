"""``s2p-deploy bench``: engines against the floating-point engine of the same backend."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from s2p_deploy.api import base_of
from s2p_deploy.cli.options import JsonOption, ModelOption, PublicKeyOption, context_from_options
from s2p_deploy.cli.output import Outcome, show, table, two_columns
from s2p_deploy.errors import GateFailedError

if TYPE_CHECKING:
    from rich.table import Table

    from s2p_deploy.bench.result import BenchResult, EngineFigures, GainGate
    from s2p_deploy.records import Number

_COLUMNS = (
    "engine",
    "recipe",
    "step p50",
    "p95",
    "of fp",
    "pictures/min",
    "of fp",
    "memory loaded",
    "steady",
    "peak",
    "of fp",
    "on disk",
    "of fp",
    "load",
)


def bench(  # noqa: PLR0913 - its options
    engines: Annotated[list[Path], typer.Argument(metavar="ENGINE...", help="What build wrote, of one backend.")],
    *,
    against: Annotated[Path, typer.Option(metavar="FP_ENGINE", help="The same backend's engine of recipe fp.")],
    batch: Annotated[int, typer.Option(min=1, help="Samples per step; one picture with guidance takes 2.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="How often the engines take turns, 3 steps each.")] = 10,
    pictures: Annotated[
        int, typer.Option(min=0, help="Pictures per engine, from text to pixels; 0 needs no pipeline.")
    ] = 3,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps per picture; those of the first engine's recipe where left out.")
    ] = None,
    speedup: Annotated[
        float | None,
        typer.Option(
            min=0.01, metavar="FACTOR", help="Exit 3 unless a step is faster than floating point's by this factor."
        ),
    ] = None,
    int8_share: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Exit 3 unless the backend computes this share of quantized layers in INT8."),
    ] = None,
    model: ModelOption = None,
    public_key: PublicKeyOption = None,
    as_json: JsonOption = False,
) -> int:
    """Measure engines against the floating-point one: time, memory, size.

    Each engine is loaded in a process of its own, and they take turns, so that other load on the machine meets all of
    them alike. Ratios of times have bootstrap 95 % intervals over the rounds. To measure on fewer cores, restrict the
    command, e.g. with taskset.

    Limits on the gain are the recipe's (section bench), but for those that options name; where an engine misses one,
    the exit code is 3.
    """
    from s2p_deploy.signing import open_engine

    opened, baseline = [open_engine(engine, public_key) for engine in engines], open_engine(against, public_key)
    from s2p_deploy.bench.measure import Load, check_comparable
    from s2p_deploy.bench.measure import bench as measure
    from s2p_deploy.recipe import Bench

    check_comparable(opened, baseline)  # before the pipeline, which may be large, is hashed
    base = base_of(baseline.manifest, model) if pictures else None
    load, limits = Load(batch, rounds, pictures, steps), Bench(speedup=speedup, int8_share=int8_share)
    with context_from_options() as context:
        found = measure(opened, baseline, load, base=base, limits=limits, context=context)
    missed = [(one.name, gate) for one in found.engines for gate in one.gates if not gate.passed]
    said = "; ".join(f"{name}: {gate.name} is {_measured(gate)}, not {gate.limit:g}" for name, gate in missed)
    failure = GateFailedError(f"no gain here, do not deploy: {said}") if missed else None
    return show(Outcome(found.model_dump(mode="json"), _text(found), failure), as_json=as_json)


def _measured(gate: GainGate) -> str:
    return "unknown" if gate.value is None else f"{gate.value:.3g}"


def _text(found: BenchResult) -> tuple[Table, ...]:
    from s2p_deploy.records import Execution

    machine = found.machine
    head = [
        ("backend", f"{found.backend}, {Execution(found.precision, found.provider, found.optimization)}"),
        ("machine", f"{machine.processor}, {machine.cores} cores, {machine.gpu or 'no GPU'}"),
        ("flags", ", ".join(machine.flags)),
        ("versions", ", ".join(f"{name} {version}" for name, version in machine.versions.items())),
        ("steps", f"batch {found.batch}, {found.rounds} rounds of {found.steps_per_round}"),
        ("pictures", f"{found.pictures} of {found.sampling_steps} steps" if found.pictures else "none"),
    ]
    rows = [_row(engine) for engine in (found.baseline, *found.engines)]
    gates = [
        (one.name, gate.name, f"{gate.limit:g}", _measured(gate), "passed" if gate.passed else "failed")
        for one in found.engines
        for gate in one.gates
    ]
    limits = (table("Gain", ("engine", "limit on", "at least", "measured", ""), gates),) if gates else ()
    return (two_columns(head), table("Against floating point", _COLUMNS, rows), *limits)


def _row(engine: EngineFigures) -> tuple[str, ...]:
    memory, ratios = engine.memory, engine.ratios
    drawn = "" if engine.images_per_minute is None else f"{engine.images_per_minute:.3g}"
    return (
        engine.name,
        engine.recipe,
        f"{engine.step_p50.value * 1e3:.4g} ms",
        f"{engine.step_p95.value * 1e3:.4g} ms",
        _ratio(ratios.step if ratios else None),
        drawn,
        _ratio(ratios.images_per_minute if ratios else None),
        _megabytes(memory.loaded),
        _megabytes(memory.steady),
        _megabytes(memory.peak),
        f"{ratios.peak_memory:.3f}" if ratios else "",
        _megabytes(engine.size),
        f"{ratios.size:.3f}" if ratios else "",
        f"{engine.load_seconds:.3g} s",
    )


def _ratio(number: Number | None) -> str:
    return "" if number is None else f"{number.value:.3f} ({number.low:.3f} to {number.high:.3f})"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.4g} MB"
