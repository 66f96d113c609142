"""``s2p-deploy validate``: an engine against the pipeline that it was made from."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from s2p_deploy.cli.options import (
    ForceOption,
    JsonOption,
    ModelOption,
    OutFolder,
    PromptsOption,
    PublicKeyOption,
    prompts_from_option,
)
from s2p_deploy.cli.outcome import Outcome, show, table
from s2p_deploy.cli.progress_bars import progress_bars
from s2p_deploy.errors import GateFailedError

if TYPE_CHECKING:
    from rich.table import Table

    from s2p_deploy.records import GateResult, ValidationReport


def validate(  # noqa: PLR0913 - its options
    engine: Annotated[Path, typer.Argument(metavar="ENGINE", help="What build wrote.")],
    *,
    prompts: PromptsOption,
    out: OutFolder,
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
    from s2p_deploy.signing import open_engine

    chosen, opened = prompts_from_option(prompts), open_engine(engine, public_key)
    from s2p_deploy.validation import open_chain
    from s2p_deploy.validation import validate as validate_chain

    chain = open_chain(opened, graph=graph, calib=calib, model=model)
    command = shlex.join(["s2p-deploy", "validate", str(engine), "--prompts", prompts, "--out", str(out)])
    with progress_bars() as progress:
        report = validate_chain(chain, chosen, out, replace=force, command=command, progress=progress)
    text = (gate_table(report.gates), f"{report.verdict}: {report.html_file}")
    return show(Outcome(_data(report), text, failure_of(report)), as_json=as_json)


def gate_table(gates: tuple[GateResult, ...]) -> Table:
    """What every gate asked and what was found."""
    rows = [(g.status, g.name, g.asks, _number(g.limit), _number(g.value), g.n, g.reason) for g in gates]
    return table("Gates", ("status", "gate", "asks", "limit", "found", "n", "why"), rows)


def failure_of(report: ValidationReport) -> GateFailedError | None:
    """None where the report's verdict is ``passed``."""
    if report.verdict == "passed":
        return None
    named = [gate.name for gate in report.failed_gates] or [g.name for g in report.gates if g.status == "not measured"]
    return GateFailedError(f"{report.verdict}: {'; '.join(named)} (see {report.html_file})")


def _data(report: ValidationReport) -> dict[str, Any]:
    return {
        "kind": report.manifest.kind,
        "path": str(report.folder),
        "digest": report.manifest.digest,
        "verdict": report.verdict,
        "report": str(report.html_file),
        "gates": [asdict(gate) for gate in report.gates],
    }


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
