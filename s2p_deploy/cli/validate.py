"""``s2p-deploy validate``: an engine against the pipeline that it was made from, or a finished report judged again."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from s2p_deploy.cli.bisect import bisect_model
from s2p_deploy.cli.options import (
    ForceOption,
    JsonOption,
    ModelOption,
    PublicKeyOption,
    SchedulesOption,
    SettingsOption,
    prompts_from_option,
    schedule_from_option,
)
from s2p_deploy.cli.outcome import Outcome, show, table
from s2p_deploy.cli.progress_bars import progress_bars
from s2p_deploy.cli.recheck import Moved, Recheck
from s2p_deploy.errors import GateFailedError, InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.table import Table

    from s2p_deploy.records import GateResult, ValidationReport


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
    recheck: Annotated[
        Path | None, typer.Option(metavar="REPORT", help="Judge this finished report by other gates; runs nothing.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="With --recheck: the recipe whose gates judge.")] = None,
    settings: SettingsOption = None,
    bisect: Annotated[
        bool, typer.Option("--bisect", help="Name the sites that cost most fidelity instead, and a plan change.")
    ] = False,
    plan_out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --bisect: where to write the changed plan.yaml.")
    ] = None,
    junit: Annotated[Path | None, typer.Option(metavar="FILE.xml", help="Write the gates as JUnit XML.")] = None,
    graph: Annotated[Path | None, typer.Option(help="Where the engine's graph is now, where it was moved.")] = None,
    calib: Annotated[
        Path | None, typer.Option(help="Where the graph's calibrated model is now, where it was moved.")
    ] = None,
    model: ModelOption = None,
    public_key: PublicKeyOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> int:
    """Compare an engine with its pipeline: numbers, pictures, a verdict. Exits 3 unless it passes."""
    moved = Moved(graph, calib, model, public_key)
    measuring = _Measuring(prompts, pictures, schedules or [], floor, weights_dir, bench)
    if bisect:
        _refuse(measuring.options | {"--out": out, "--recheck": recheck}, "--bisect looks at stored latents only")
        return bisect_model(engine, calib, plan_out, as_json=as_json)
    _refuse({"--plan-out": plan_out}, "only --bisect changes a plan")
    if recheck is not None:
        _refuse(measuring.options, "--recheck measures nothing")
        report, judgement = Recheck(recheck, recipe, settings or [], out, force).judged(engine, moved)
        return _shown(report, judgement.gates, judgement.verdict, junit, as_json=as_json)
    _refuse({"--recipe": recipe, "--set": settings}, "the gates were fixed in the engine's recipe, before the run")
    report = measuring.report(engine, moved, out, replace=force)
    return _shown(report, report.gates, report.verdict, junit, as_json=as_json)


@dataclass(frozen=True)
class _Measuring:
    """What is measured, as the options say it."""

    prompts: str | None
    pictures: int | None
    schedules: list[str]
    floor: Path | None
    weights_dir: Path | None
    bench: Path | None

    @property
    def options(self) -> dict[str, object]:
        """By name."""
        drawn = {"--prompts": self.prompts, "--pictures": self.pictures, "--schedule": self.schedules}
        return drawn | {"--floor": self.floor, "--weights-dir": self.weights_dir, "--bench": self.bench}

    def report(self, engine: Path | None, moved: Moved, out: Path | None, *, replace: bool) -> ValidationReport:
        """Validates an engine."""
        if engine is None or self.prompts is None or out is None:
            raise InputError("validate takes ENGINE, --prompts and --out, or --recheck REPORT")
        from s2p_deploy.signing import open_engine
        from s2p_deploy.validation import open_weights
        from s2p_deploy.validation import validate as validate_chain

        prompts, schedules = prompts_from_option(self.prompts), tuple(map(schedule_from_option, self.schedules))
        weights = open_weights(self.weights_dir) if self.weights_dir else None
        floor = open_engine(self.floor, moved.public_key) if self.floor else None
        bench = _bench_from(self.bench) if self.bench else None
        chain = moved.chain(engine)
        with progress_bars() as progress:
            return validate_chain(
                chain,
                prompts,
                out,
                pictures=self.pictures,
                schedules=schedules,
                floor=floor,
                weights=weights,
                bench=bench,
                replace=replace,
                command=_command(engine, self.options | {"--out": out}),
                progress=progress,
            )


def _bench_from(file: Path) -> dict[str, Any]:
    from s2p_deploy.bench.result import BenchResult

    try:
        return BenchResult.model_validate_json(file.read_bytes()).model_dump(mode="json")
    except (OSError, ValueError) as error:
        raise InputError(f"--bench {file} is not what s2p-deploy bench --json prints: run it on this engine") from error


def gate_table(gates: tuple[GateResult, ...]) -> Table:
    """What every gate asked and what was found."""
    rows = [(g.status, g.name, g.asks, _number(g.limit), _number(g.value), g.n, g.where, g.reason) for g in gates]
    return table("Gates", ("status", "gate", "asks", "limit", "found", "n", "where", "why"), rows)


def failure_of(report: ValidationReport) -> GateFailedError | None:
    """None where the report's verdict is ``passed``."""
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
    """The command line, for the report."""
    parts = ["s2p-deploy", "validate", str(engine)]
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            parts += [] if one is None else [name, str(one)]
    return shlex.join(parts)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
