"""``s2p-deploy validate``: an engine against the pipeline that it was made from, or a finished report judged again."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from s2p_deploy.api import as_prompts
from s2p_deploy.api import validate as validate_engine
from s2p_deploy.cli.bisect import bisect_model
from s2p_deploy.cli.options import (
    ForceOption,
    JsonOption,
    ModelOption,
    PublicKeyOption,
    ReferenceDeviceOption,
    SchedulesOption,
    SettingsOption,
    context_from_options,
    overrides_from_settings,
    schedule_from_option,
    writable_file,
)
from s2p_deploy.cli.output import Outcome, show, table
from s2p_deploy.errors import GateFailedError, InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.table import Table

    from s2p_deploy.records import GateResult, ValidationReport
    from s2p_deploy.validation import Chain, Judgement


def validate(  # noqa: PLR0913 - its options
    engine: Annotated[Path | None, typer.Argument(metavar="ENGINE", help="What build wrote.")] = None,
    *,
    prompts: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Held-out prompts, as for calibrate, e.g. shapes:held_out."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the report to write.")] = None,
    pictures: Annotated[int | None, typer.Option(min=1, help="How many prompts are drawn; the recipe says.")] = None,
    schedules: SchedulesOption = None,
    floor: Annotated[
        Path | None, typer.Option(metavar="FP_ENGINE", help="An engine of recipe fp to report beside this one.")
    ] = None,
    weights_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Weights for LPIPS, FID and CLIP scores, with SHA256SUMS.")
    ] = None,
    bench: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="What bench --json printed of this engine, for the report.")
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:WEIGHT]",
            help="A LoRA that acts in all pictures, the pipeline's and the engine's; repeatable.",
        ),
    ] = None,
    recheck: Annotated[
        Path | None, typer.Option(metavar="REPORT", help="Judge this finished report by other gates; runs nothing.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="With --recheck: the recipe whose gates judge.")] = None,
    settings: SettingsOption = None,
    bisect: Annotated[
        bool, typer.Option("--bisect", help="Name the layers that cost most fidelity instead, and a plan change.")
    ] = False,
    plan_out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="With --bisect: where to write the changed plan.yaml.", callback=writable_file
        ),
    ] = None,
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE.xml", help="Write the gates as JUnit XML.", callback=writable_file)
    ] = None,
    graph: Annotated[Path | None, typer.Option(help="Where the engine's graph is now, where it was moved.")] = None,
    calib: Annotated[
        Path | None, typer.Option(help="Where the graph's calibrated model is now, where it was moved.")
    ] = None,
    model: ModelOption = None,
    public_key: PublicKeyOption = None,
    device: ReferenceDeviceOption = "auto",
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> int:
    """Compare an engine with its floating-point pipeline: numbers, pictures, a verdict.

    Writes report.html, report.json and all measurements; exits 3 unless the verdict is passed. A run that was stopped
    continues where it was. --bisect names the layers that cost most fidelity and suggests a plan; --recheck judges a
    finished report by other gates and runs nothing.
    """
    measuring: dict[str, object] = {"--prompts": prompts, "--pictures": pictures, "--schedule": schedules}
    measuring |= {"--floor": floor, "--weights-dir": weights_dir, "--bench": bench, "--lora": lora}
    if bisect:
        _refuse(measuring | {"--out": out, "--recheck": recheck}, "--bisect looks at stored latents only")
        return bisect_model(engine, calib, plan_out, device, as_json=as_json)
    _refuse({"--plan-out": plan_out}, "only --bisect changes a plan")
    moved: dict[str, Any] = {"graph": graph, "calib": calib, "model": model}
    measuring["--device"] = None if device == "auto" else device
    if recheck is not None:
        _refuse(measuring, "--recheck measures nothing")
        report, judgement = _rechecked(
            recheck, recipe, settings or [], engine, out, replace=force, public_key=public_key, **moved
        )
        return _shown(report, judgement.gates, judgement.verdict, junit, as_json=as_json)
    _refuse({"--recipe": recipe, "--set": settings}, "the gates were fixed in the engine's recipe, before the run")
    if engine is None or prompts is None or out is None:
        raise InputError("validate takes ENGINE, --prompts and --out, or --recheck REPORT")
    options: dict[str, Any] = {
        "pictures": pictures,
        "schedules": [schedule_from_option(text) for text in schedules or ()],
        "weights": weights_dir,
        "lora": lora or (),
        "bench": _bench_from(bench) if bench else None,
        "command": _command(engine, measuring | {"--out": out}),
        "force": force,
    }
    given = as_prompts(prompts)
    from s2p_deploy.signing import open_engine

    opened, opened_floor = open_engine(engine, public_key), open_engine(floor, public_key) if floor else None
    with context_from_options(device) as context:
        report = validate_engine(
            opened, prompts=given, out=out, floor=opened_floor, context=context, **moved, **options
        )
    return _shown(report, report.gates, report.verdict, junit, as_json=as_json)


def _chain(engine: Path, *, public_key: Path | None, **moved: Any) -> Chain:  # noqa: ANN401 - as open_chain takes it
    """Opens an engine, checks its signature where a key is given, and finds what it was made from."""
    from s2p_deploy.signing import open_engine

    opened = open_engine(engine, public_key)
    from s2p_deploy.validation import open_chain

    return open_chain(opened, **moved)


def _rechecked(
    folder: Path,
    recipe: str | None,
    settings: list[str],
    engine: Path | None,
    out: Path | None,
    *,
    replace: bool,
    **moved: Any,  # noqa: ANN401 - as _chain takes it
) -> tuple[ValidationReport, Judgement]:
    """Judges the report in ``folder`` by the gates of a recipe and settings; writes a new one to ``out``, if given.

    Raises:
        InputError: there is no such report, recipe or gate. IntegrityError: the report is damaged.
    """
    from s2p_deploy.recipe import Recipe
    from s2p_deploy.records import ValidationReport, parent_folder
    from s2p_deploy.validation import gates_from, write_rechecked
    from s2p_deploy.validation import recheck as judge_again

    report = ValidationReport.open(folder)
    gates = gates_from(report, Recipe.load(recipe) if recipe else None, overrides_from_settings(settings))
    judgement = judge_again(report, gates)
    if out is None:
        return report, judgement
    chain = _chain(parent_folder(report.folder, report.manifest, "engine", engine), **moved)
    words = [*(["--recipe", recipe] if recipe else []), *(word for text in settings for word in ("--set", text))]
    command = shlex.join(["s2p-deploy", "validate", "--recheck", str(folder), *words])
    return write_rechecked(report, chain, gates, out, replace=replace, command=command), judgement


def _bench_from(file: Path) -> dict[str, Any]:
    from s2p_deploy.bench.result import BenchResult

    try:
        return BenchResult.model_validate_json(file.read_bytes()).model_dump(mode="json")
    except (OSError, ValueError) as error:
        raise InputError(f"--bench {file} is not what s2p-deploy bench --json prints: run it on this engine") from error


def gate_table(gates: tuple[GateResult, ...]) -> Table:
    """Lists every gate: its limit and the measured value."""
    rows = [(g.status, g.name, g.asks, _number(g.limit), _number(g.value), g.n, g.where, g.reason) for g in gates]
    return table("Gates", ("status", "gate", "asks", "limit", "measured", "n", "where", "why"), rows)


def failure_of(report: ValidationReport) -> GateFailedError | None:
    """Returns the error of a report's verdict; None where it is ``passed``."""
    return _failure(report, report.gates, report.verdict)


def _failure(report: ValidationReport, gates: tuple[GateResult, ...], verdict: str) -> GateFailedError | None:
    if verdict == "passed":
        return None
    open_gates = [g.name for g in gates if g.status == "not measured"]
    named = [g.name for g in gates if g.status == "failed"] or open_gates
    # a page shows the verdict of its own gates
    page = f"see {report.html_file}" if verdict == report.verdict else "--out writes a page with these gates"
    return GateFailedError(f"{verdict}: {'; '.join(named)} ({page})")


def _shown(
    report: ValidationReport, gates: tuple[GateResult, ...], verdict: str, junit: Path | None, *, as_json: bool
) -> int:
    """Prints the gates, and writes them to ``junit``; the exit code."""
    if junit is not None:
        from s2p_deploy.validation import junit_xml

        junit.parent.mkdir(parents=True, exist_ok=True)
        junit.write_text(junit_xml(gates, f"s2p-deploy validate {report.folder}"), encoding="utf-8")
    data = {
        "kind": report.manifest.kind,
        "path": str(report.folder),
        "digest": report.manifest.digest,
        "verdict": verdict,
        "report": str(report.html_file),
        "gates": [asdict(gate) for gate in gates],
    }
    text = (gate_table(gates), f"{verdict}: {report.html_file}")
    return show(Outcome(data, text, _failure(report, gates, verdict)), as_json=as_json)


def _refuse(options: Mapping[str, object], reason: str) -> None:
    for name, value in options.items():
        if value:
            raise InputError(f"{name} cannot be given here: {reason}")


def _command(engine: Path, options: Mapping[str, object]) -> str:
    """Writes the command line, for the report."""
    parts = ["s2p-deploy", "validate", str(engine)]
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            parts += [] if one is None else [name, str(one)]
    return shlex.join(parts)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
