"""``s2p-deploy demo``: every stage on the bundled pipeline, and a table of the engines."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from s2p_deploy import api
from s2p_deploy.cli.options import (
    DeviceOption,
    JsonOption,
    SettingsOption,
    ThreadsOption,
    context_from_options,
    overrides_from_settings,
)
from s2p_deploy.cli.output import Outcome, show, table
from s2p_deploy.cli.validate import failure_of, gate_table
from s2p_deploy.errors import GateFailedError

if TYPE_CHECKING:
    from rich.table import Table

    from s2p_deploy.context import Context
    from s2p_deploy.families import BasePipeline
    from s2p_deploy.recipe import Recipe
    from s2p_deploy.records import (
        CalibratedModel,
        Engine,
        ExportedGraph,
        Manifest,
        PromptSet,
        ValidationReport,
    )

_ITERATIONS = 600  # of w4a8's training, which the preset does longer: the demo takes minutes
_SHORT = 16  # pictures of every validation but the first
_PROMPT = "a large red circle at the top left and a small blue square at the bottom right, white background"
_SEED = 7
_OTHER_STEPS, _OTHER_SCHEDULER = 20, "ddim"  # the schedule that the first engine is validated on besides its own
_START = "StartComparison"
_LATENCY_BATCH = 2  # one picture: both branches of guidance
_LATENCY_CALLS = 50


def demo(
    *,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of everything that the demo makes.")],
    settings: SettingsOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    force: Annotated[bool, typer.Option("--force", help="Make everything anew instead of continuing.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Run every stage on the bundled pipeline.

    Calibrates, exports, builds an engine with every backend that works here, validates and generates. A demo that was
    stopped continues where it was.
    """
    from s2p_deploy import Recipe

    given = overrides_from_settings(settings)
    overrides = given | {"training": {"iterations": _ITERATIONS} | given.get("training", {})}
    untrained = overrides | {"training": overrides["training"] | {"iterations": 0}}
    recipes = {
        "w4a8": Recipe.load("w4a8", overrides),
        "w4a8-untrained": Recipe.load("w4a8", untrained),
        "fp": Recipe.load("fp"),
    }
    train, held_out = api.as_prompts("shapes:train"), api.as_prompts("shapes:held_out")
    from s2p_deploy.engines import backend_by_name

    with context_from_options(device, threads) as context:
        run = Demo(out, api.as_base("shapes", out), train, held_out, force, context)
        trained, start, baseline = (run.calibrate(name, recipe) for name, recipe in recipes.items())
        graph, half, plain = run.export(trained, "fp32"), run.export(trained, "fp16"), run.export(baseline, "fp32")
        works = {
            name: backend_by_name(name).capabilities().missing is None
            for name in ("openvino", "onnxruntime", "tensorrt_rtx")
        }
        rows: list[Row] = []
        reports: list[ValidationReport] = []
        for backend in (name for name in ("openvino", "onnxruntime") if works[name]):
            engine = run.build(graph, backend)
            first = not reports
            reports.append(run.validate(engine, None if first else _SHORT, reschedule=first))
            if first:
                picture = run.generate(engine)
            rows += [_baseline_row(run.build(plain, backend)), _row(engine, reports[-1])]
        if works["tensorrt_rtx"]:
            engine = run.build(half, "tensorrt_rtx")
            name = f"W4A8, {engine.backend} {engine.precision}"
            rows.append(Row(name, _engine_bytes(engine), verdict="built, not validated here"))
        before = run.psnr_before_training(start)
    return show(_outcome(out, rows, reports, before, picture), as_json=as_json)


@dataclass(frozen=True)
class Demo:
    """The demo's stages: each opens its artifact if that is finished for the same parents, else makes it."""

    folder: Path
    base: BasePipeline
    train: PromptSet
    held_out: PromptSet
    force: bool
    context: Context

    def calibrate(self, name: str, recipe: Recipe) -> CalibratedModel:
        """Makes ``<folder>/<name>/calib``; recipes that sample alike share a dataset."""
        from s2p_deploy.calib import dataset_name

        out = self.folder / name / "calib"
        return api.calibrate(
            self.base,
            recipe=recipe,
            prompts=self.train,
            out=out,
            dataset=self.folder / "datasets" / dataset_name(recipe),
            force=self.force,
            context=self._labelled(out),
        )

    def export(self, calibrated: CalibratedModel, dtype: Literal["fp32", "fp16"]) -> ExportedGraph:
        """Makes the graph beside its calibrated model."""
        from s2p_deploy.records import ExportedGraph

        out = calibrated.folder.parent / f"graph-{dtype}"
        if self._is_finished(out, "calib", calibrated.manifest):
            return ExportedGraph.open(out)
        return api.export_graph(calibrated, out=out, dtype=dtype, force=True, context=self._labelled(out))

    def build(self, graph: ExportedGraph, backend: str) -> Engine:
        """Makes the engine beside its graph, with the backend's defaults."""
        out = graph.folder.parent / f"engine-{backend}"
        if self._is_finished(out, "graph", graph.manifest):
            return api.as_engine(out)
        return api.build_engine(graph, backend=backend, out=out, force=True, context=self._labelled(out))

    def validate(self, engine: Engine, pictures: int | None, *, reschedule: bool) -> ValidationReport:
        """Makes the report beside its engine, over the first ``pictures`` held-out prompts (None: the recipe's)."""
        from s2p_deploy.pipeline import Schedule
        from s2p_deploy.records import ValidationReport

        out = engine.folder.parent / f"report-{engine.backend}"
        if self._is_finished(out, "engine", engine.manifest):
            return ValidationReport.open(out)
        return api.validate(
            engine,
            prompts=self.held_out,
            out=out,
            pictures=pictures,
            schedules=[Schedule(_OTHER_STEPS, _OTHER_SCHEDULER)] if reschedule else [],
            force=True,
            command="s2p-deploy demo",
            context=self._labelled(out),
        )

    def generate(self, engine: Engine) -> Path:
        """Writes ``<folder>/picture.png``, sampled as the engine's recipe says."""
        from s2p_deploy.pipeline import Schedule, generate
        from s2p_deploy.records import Prompt

        out = self.folder / "picture.png"
        recipe = self._recipe_of(engine.manifest)
        schedule, guidance = Schedule.of(recipe.sampling), self._guidance(recipe)
        with api.open_pipeline(engine, model=self.base, context=self.context) as opened:
            picture = generate(
                opened.pipe, Prompt("demo", _PROMPT), schedule=schedule, guidance_scale=guidance, seed=_SEED
            )
        picture.save(out)
        return out

    def psnr_before_training(self, start: CalibratedModel) -> float:
        """Measures the untrained model's median PSNR in dB against the pipeline, over the held-out prompts."""
        import numpy as np

        from s2p_deploy.records import open_artifact, write_artifact

        out = start.folder.parent / "pictures"
        if not self._is_finished(out, "calib", start.manifest):
            write_artifact(
                out,
                kind=_START,
                base=start.manifest.base,
                recipe=start.manifest.recipe,
                fill=lambda _folder: {"psnr": self._psnr_of(start)},
                parents={"calib": (start.folder, start.manifest)},
                replace=True,
            )
        return float(np.median(open_artifact(out, _START).content["psnr"]))

    def _psnr_of(self, start: CalibratedModel) -> list[float]:
        from s2p_deploy.calib import fake_quant_denoiser, fp_denoiser
        from s2p_deploy.engines import TorchRunner
        from s2p_deploy.families import denoiser_of, load_pipeline
        from s2p_deploy.pipeline import Schedule, engine_denoiser
        from s2p_deploy.validation import picture_psnr

        recipe = self._recipe_of(start.manifest)
        pipe = load_pipeline(self.base)
        reference, candidate = (
            engine_denoiser(TorchRunner(module), denoiser_of(pipe).config, start.timesteps)
            for module in (fp_denoiser(self.base, recipe.sampling.steps), fake_quant_denoiser(start))
        )
        prompts = self.held_out.first(recipe.validation.pictures)
        progress = self._labelled(start.folder.parent / "pictures").progress
        progress("before training", 0, 1)
        psnr = picture_psnr(pipe, reference, candidate, prompts, Schedule.of(recipe.sampling), self._guidance(recipe))
        progress("before training", 1, 1)
        return [float(value) for value in psnr]

    def _recipe_of(self, manifest: Manifest) -> Recipe:
        return api.as_recipe(manifest.recipe)

    def _guidance(self, recipe: Recipe) -> float:
        return recipe.sampling.guidance(self.base.default_guidance)

    def _labelled(self, out: Path) -> Context:
        """Copies the context; its progress names the artifact."""
        show_progress, label = self.context.progress, f"{out.parent.name} {out.name}"
        return dataclasses.replace(
            self.context, progress=lambda stage, done, total: show_progress(f"{label}: {stage}", done, total)
        )

    def _is_finished(self, out: Path, parent: str, manifest: Manifest) -> bool:
        """Tells whether ``out`` is an artifact of that very parent, which is to be kept."""
        from s2p_deploy.records import read_manifest

        if self.force or not (out / "manifest.json").is_file():
            return False
        return read_manifest(out).parents[parent].digest == manifest.digest


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


def _baseline_row(engine: Engine) -> Row:
    name = f"FP, {engine.backend} {engine.precision}"
    return Row(name, _engine_bytes(engine), _milliseconds_per_step(engine), verdict="baseline")


def _row(engine: Engine, report: ValidationReport) -> Row:
    pictures, others = report.data["pictures"], report.data["other_schedules"]
    accuracy = pictures["accuracy"]
    return Row(
        engine=f"W4A8, {engine.backend} {engine.precision}",
        bytes=_engine_bytes(engine),
        milliseconds_per_step=_milliseconds_per_step(engine),
        median_psnr=pictures["median"]["psnr"]["value"],
        psnr_ddim_20=others[0]["median"]["psnr"]["value"] if others else None,
        accuracy=accuracy["engine"]["value"],
        fp_accuracy=accuracy["fp"]["value"],
        verdict=report.verdict,
    )


def _milliseconds_per_step(engine: Engine) -> float:
    """Measures the median wall time in ms of one denoiser call for one guided picture (batch 2) on this machine."""
    import numpy as np

    times = []
    with api.load_engine(engine) as runner:
        values = {
            spec.name: np.zeros([_LATENCY_BATCH if isinstance(size, str) else size for size in spec.shape], spec.dtype)
            for spec in runner.inputs
        }
        values["timestep_index"] += engine.timesteps.calibrated_indices[0]
        for _ in range(_LATENCY_CALLS):
            start = time.perf_counter()
            runner.infer(values)
            times.append(time.perf_counter() - start)
    return 1000 * float(np.median(times))


def _engine_bytes(engine: Engine) -> int:
    return sum((engine.folder / name).stat().st_size for name in engine.engine_files)


def _outcome(out: Path, rows: list[Row], reports: list[ValidationReport], psnr_before: float, picture: Path) -> Outcome:
    """Writes ``summary.json`` and copies the first report to the top."""
    for name in ("report.html", "report.json"):
        shutil.copyfile(reports[0].folder / name, out / name)
    psnr = float(reports[0].data["pictures"]["median"]["psnr"]["value"])
    failures = [str(failure) for failure in map(failure_of, reports) if failure]
    if not psnr > psnr_before:
        failures.append(
            f"W4A8 median PSNR {psnr:.2f} dB is not above its own start before training, {psnr_before:.2f} dB"
        )
    data: dict[str, Any] = {
        "engines": [asdict(row) for row in rows],
        "median_psnr": psnr,
        "median_psnr_before_training": psnr_before,
        "picture": str(picture),
        "report": str(out / "report.html"),
        "verdict": "failed" if failures else "passed",
    }
    (out / "summary.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    text = (
        gate_table(reports[0].gates),
        _table(rows),
        f"Median PSNR before training {psnr_before:.2f} dB, after it {psnr:.2f} dB.",
        f"Picture: {picture}",
        f"Report: {out / 'report.html'}",
    )
    return Outcome(data, text, GateFailedError("; ".join(failures)) if failures else None)


def _table(rows: list[Row]) -> Table:
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
