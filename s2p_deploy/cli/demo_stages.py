"""The demo's stages: each opens its artifact where it stands for the same request, and makes it otherwise."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.calib import calibrate, dataset_name, fake_quant_denoiser, fp_denoiser
from s2p_deploy.engines import TorchRunner, build_engine, load_engine
from s2p_deploy.export import export_graph
from s2p_deploy.families import denoiser_of, load_pipeline
from s2p_deploy.pipeline import Schedule, engine_denoiser, generate, pipeline_with_engine
from s2p_deploy.recipe import Recipe, recipe_from_data
from s2p_deploy.records import (
    CalibratedModel,
    Engine,
    ExportedGraph,
    Manifest,
    Prompt,
    PromptSet,
    ValidationReport,
    open_artifact,
    read_manifest,
    write_artifact,
)
from s2p_deploy.validation import open_chain, picture_psnr, validate

if TYPE_CHECKING:
    from pathlib import Path

    from s2p_deploy.families import BasePipeline
    from s2p_deploy.progress import Progress

RESCHEDULED = Schedule(20, "ddim")
_START = "StartComparison"
_LATENCY_BATCH = 2  # one picture: both branches of guidance
_LATENCY_CALLS = 50


@dataclass(frozen=True)
class DemoRun:
    """Where a demo writes, what it starts from, and whether it makes everything anew."""

    folder: Path
    base: BasePipeline
    train: PromptSet
    held_out: PromptSet
    force: bool
    progress: Progress

    def calibrated(self, name: str, recipe: Recipe) -> CalibratedModel:
        """``<folder>/<name>/calib``."""
        out = self.folder / name / "calib"
        options: dict[str, Any] = {"dataset": self.folder / "datasets" / dataset_name(recipe), "replace": self.force}
        return calibrate(self.base, recipe, self.train, out, progress=self._told(name), **options)

    def exported(self, calibrated: CalibratedModel, dtype: Any) -> ExportedGraph:  # noqa: ANN401 - fp32 or fp16
        """The graph beside its calibrated model."""
        out = calibrated.folder.parent / f"graph-{dtype}"
        if self._stands(out, "calib", calibrated.manifest):
            return ExportedGraph.open(out)
        return export_graph(calibrated, out, dtype=dtype, replace=True, progress=self._told(_label(out)))

    def built(self, graph: ExportedGraph, backend: str) -> Engine:
        """The engine beside its graph, with the backend's default hint."""
        out = graph.folder.parent / f"engine-{backend}"
        if self._stands(out, "graph", graph.manifest):
            return Engine.open(out)
        return build_engine(graph, backend, out, replace=True, progress=self._told(_label(out)))

    def validated(self, engine: Engine, pictures: int | None, schedules: tuple[Schedule, ...]) -> ValidationReport:
        """The report beside its engine, over the first ``pictures`` held-out prompts (None: what the recipe says)."""
        out = engine.folder.parent / f"report-{engine.backend}"
        if self._stands(out, "engine", engine.manifest):
            return ValidationReport.open(out)
        chain = open_chain(engine)
        options: dict[str, Any] = {"pictures": pictures, "schedules": schedules, "command": "s2p-deploy demo"}
        return validate(chain, self.held_out, out, replace=True, progress=self._told(_label(out)), **options)

    def drawn(self, engine: Engine, prompt: str, seed: int) -> Path:
        """``<folder>/picture.png``, as the engine's recipe samples."""
        out = self.folder / "picture.png"
        recipe = recipe_from_data(engine.manifest.recipe, str(engine.folder))
        guidance = recipe.sampling.guidance_scale or self.base.default_guidance
        with load_engine(engine) as runner:
            pipe = pipeline_with_engine(load_pipeline(self.base), engine, runner)
            schedule = Schedule.of(recipe.sampling)
            generate(pipe, Prompt("demo", prompt), schedule=schedule, guidance_scale=guidance, seed=seed).save(out)
        return out

    def start_psnr(self, start: CalibratedModel) -> float:
        """Median PSNR in dB of the untrained start's pictures against the pipeline's, over the held-out prompts."""
        out = start.folder.parent / "pictures"
        if not self._stands(out, "calib", start.manifest):
            write_artifact(
                out,
                kind=_START,
                base=start.manifest.base,
                recipe=start.manifest.recipe,
                fill=lambda _folder: {"psnr": self._start_pictures(start)},
                parents={"calib": (start.folder, start.manifest)},
                replace=True,
            )
        return float(np.median(open_artifact(out, _START).content["psnr"]))

    def _start_pictures(self, start: CalibratedModel) -> list[float]:
        recipe = recipe_from_data(start.manifest.recipe, str(start.folder))
        pipe = load_pipeline(self.base)
        reference, candidate = (
            engine_denoiser(TorchRunner(module), denoiser_of(pipe).config, start.timesteps)
            for module in (fp_denoiser(self.base, recipe.sampling.steps), fake_quant_denoiser(start))
        )
        prompts = self.held_out.first(recipe.validation.pictures)
        guidance = recipe.sampling.guidance_scale or self.base.default_guidance
        progress = self._told(start.folder.parent.name)
        progress("pictures before training", 0, 1)
        found = picture_psnr(pipe, reference, candidate, prompts, Schedule.of(recipe.sampling), guidance)
        progress("pictures before training", 1, 1)
        return [float(value) for value in found]

    def _told(self, what: str) -> Progress:
        return lambda stage, done, total: self.progress(f"{what}: {stage}", done, total)

    def _stands(self, out: Path, parent: str, manifest: Manifest) -> bool:
        """Whether ``out`` is a finished artifact of that very parent."""
        if self.force or not (out / "manifest.json").is_file():
            return False
        return read_manifest(out).parents[parent].digest == manifest.digest


def _label(out: Path) -> str:
    return f"{out.parent.name} {out.name}"


def milliseconds_per_step(engine: Engine) -> float:
    """Median wall time of one denoiser call for one guided picture (batch 2), in milliseconds, on this machine."""
    times = []
    with load_engine(engine) as runner:
        values = {
            spec.name: np.zeros([_LATENCY_BATCH if isinstance(size, str) else size for size in spec.shape], spec.dtype)
            for spec in runner.inputs
        }
        values["step_index"] += engine.timesteps.calibrated_rows[0]
        for _ in range(_LATENCY_CALLS):
            start = time.perf_counter()
            runner.infer(values)
            times.append(time.perf_counter() - start)
    return 1000 * float(np.median(times))


def engine_bytes(engine: Engine) -> int:
    """Size of an engine's own files."""
    return sum((engine.folder / name).stat().st_size for name in engine.engine_files)
