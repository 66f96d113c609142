"""``s2p-deploy demo``: every stage on the bundled pipeline, and a table of what came out."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from s2p_deploy.cli.options import JsonOption, SettingsOption, overrides_from_settings, prompts_from_option
from s2p_deploy.cli.outcome import Outcome, show, table
from s2p_deploy.cli.progress_bars import progress_bars
from s2p_deploy.cli.validate import failure_of, gate_table
from s2p_deploy.errors import GateFailedError

if TYPE_CHECKING:
    from s2p_deploy.cli.demo_stages import DemoRun
    from s2p_deploy.records import CalibratedModel, Engine, ValidationReport

_SHORT = 16  # pictures of every validation but the first
_PROMPT = "a large red circle at the top left and a small blue square at the bottom right, white background"
_SEED = 7


@dataclass(frozen=True)
class Row:
    """One engine of the closing table; None where it was not measured. Times are of one denoiser call at batch 2."""

    engine: str
    bytes: int
    milliseconds_per_step: float | None = None
    median_psnr: float | None = None
    psnr_ddim_20: float | None = None
    accuracy: float | None = None
    fp_accuracy: float | None = None
    verdict: str = ""


@dataclass(frozen=True)
class Findings:
    """What a demo came to. ``start_psnr``: median PSNR in dB of the pictures before training, over the same prompts."""

    rows: tuple[Row, ...]
    reports: tuple[ValidationReport, ...]
    start_psnr: float
    picture: Path

    @property
    def trained_psnr(self) -> float:
        """Median PSNR in dB of the first report."""
        return float(self.reports[0].data["pictures"]["median"]["psnr"]["value"])

    @property
    def failure(self) -> GateFailedError | None:
        """What was not met: a gate of a report, or W4A8 above its own start before training."""
        failures = [str(failure) for failure in map(failure_of, self.reports) if failure]
        if not self.trained_psnr > self.start_psnr:
            failures.append(
                f"W4A8 median PSNR {self.trained_psnr:.2f} dB is not above its own start before training,"
                f" {self.start_psnr:.2f} dB"
            )
        return GateFailedError("; ".join(failures)) if failures else None


def demo(
    *,
    out: Annotated[Path, typer.Option("--out", help="Folder of everything that the demo makes.")],
    settings: SettingsOption = None,
    force: Annotated[bool, typer.Option("--force", help="Make everything anew instead of going on.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Take the bundled pipeline all the way: calibrate, export, build, validate, generate. Goes on where it was."""
    from s2p_deploy.recipe import load_recipe

    overrides = overrides_from_settings(settings)
    untrained = overrides | {"training": overrides.get("training", {}) | {"iterations": 0}}
    recipes = [load_recipe("w4a8", overrides), load_recipe("w4a8", untrained), load_recipe("fp")]
    train, held_out = prompts_from_option("shapes:train"), prompts_from_option("shapes:held_out")
    from s2p_deploy.cli.demo_stages import DemoRun
    from s2p_deploy.families import resolve_base

    with progress_bars() as progress:
        run = DemoRun(out, resolve_base("shapes"), train, held_out, force, progress)
        names = ("w4a8", "w4a8-untrained", "fp")
        trained, start, baseline = (run.calibrated(*pair) for pair in zip(names, recipes, strict=True))
        findings = _findings(run, trained, start, baseline)
    return show(_outcome(out, findings), as_json=as_json)


def _findings(run: DemoRun, trained: CalibratedModel, start: CalibratedModel, baseline: CalibratedModel) -> Findings:
    """Builds with every backend that works here, and validates what runs here; the first report is the demo's."""
    from s2p_deploy.cli.demo_stages import RESCHEDULED
    from s2p_deploy.engines import backend_by_name

    can = {name: backend_by_name(name).capabilities() for name in ("openvino", "onnxruntime", "tensorrt_rtx")}
    graph, half = run.exported(trained, "fp32"), run.exported(trained, "fp16")
    plain = run.exported(baseline, "fp32")
    rows: list[Row] = []
    reports: list[ValidationReport] = []
    engines: list[Engine] = []
    for backend in (name for name in ("openvino", "onnxruntime") if can[name].missing is None):
        full = not reports
        engines.append(run.built(graph, backend))
        reports.append(run.validated(engines[-1], None if full else _SHORT, (RESCHEDULED,) if full else ()))
        rows += [_float_row(run.built(plain, backend)), _row(engines[-1], reports[-1])]
    if can["tensorrt_rtx"].missing is None:
        rows.append(_unvalidated_row(run.built(half, "tensorrt_rtx")))
    picture = run.drawn(engines[0], _PROMPT, _SEED)
    return Findings(tuple(rows), tuple(reports), run.start_psnr(start), picture)


def _float_row(engine: Engine) -> Row:
    from s2p_deploy.cli.demo_stages import engine_bytes, milliseconds_per_step

    return Row(
        f"FP, {engine.backend} {engine.hint}", engine_bytes(engine), milliseconds_per_step(engine), verdict="baseline"
    )


def _unvalidated_row(engine: Engine) -> Row:
    from s2p_deploy.cli.demo_stages import engine_bytes

    return Row(f"W4A8, {engine.backend} {engine.hint}", engine_bytes(engine), verdict="built, not validated here")


def _row(engine: Engine, report: ValidationReport) -> Row:
    from s2p_deploy.cli.demo_stages import engine_bytes, milliseconds_per_step

    pictures, others = report.data["pictures"], report.data["other_schedules"]
    accuracy = pictures["accuracy"]
    return Row(
        engine=f"W4A8, {engine.backend} {engine.hint}",
        bytes=engine_bytes(engine),
        milliseconds_per_step=milliseconds_per_step(engine),
        median_psnr=pictures["median"]["psnr"]["value"],
        psnr_ddim_20=others[0]["median"]["psnr"]["value"] if others else None,
        accuracy=accuracy["engine"]["value"],
        fp_accuracy=accuracy["fp"]["value"],
        verdict=report.verdict,
    )


def _outcome(out: Path, found: Findings) -> Outcome:
    """Writes ``summary.json`` and copies the first report to the top."""
    for name in ("report.html", "report.json"):
        shutil.copyfile(found.reports[0].folder / name, out / name)
    data: dict[str, Any] = {
        "engines": [asdict(row) for row in found.rows],
        "median_psnr": found.trained_psnr,
        "median_psnr_before_training": found.start_psnr,
        "picture": str(found.picture),
        "report": str(out / "report.html"),
        "verdict": "failed" if found.failure else "passed",
    }
    (out / "summary.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    training = f"Median PSNR before training {found.start_psnr:.2f} dB, after it {found.trained_psnr:.2f} dB."
    text = (
        gate_table(found.reports[0].gates),
        _table(found.rows),
        training,
        f"Picture: {found.picture}",
        f"Report: {out / 'report.html'}",
    )
    return Outcome(data, text, found.failure)


def _table(rows: tuple[Row, ...]) -> Any:  # noqa: ANN401 - a rich table
    columns = ("engine", "MB", "ms per step", "median PSNR dB", "DDIM 20 steps", "accuracy", "FP's accuracy", "verdict")
    cells = [
        (
            row.engine,
            f"{row.bytes / 1e6:.2f}",
            *(_cell(value) for value in (row.milliseconds_per_step, row.median_psnr, row.psnr_ddim_20)),
            *(_cell(value, 3) for value in (row.accuracy, row.fp_accuracy)),
            row.verdict,
        )
        for row in rows
    ]
    return table("Engines (one denoiser call of one guided picture: batch 2)", columns, cells)


def _cell(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"
