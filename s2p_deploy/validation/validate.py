"""The stage: an engine and prompts give a ValidationReport. A failed gate is a result, not an error."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from s2p_deploy.calib import fake_quant_denoiser
from s2p_deploy.calib.dataset.sampler import Sampler
from s2p_deploy.calib.dataset.texts import encode_prompts
from s2p_deploy.calib.dataset.trajectories import call_rows
from s2p_deploy.engines import backend_by_name, load_engine, recorded_lowerings
from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.families import denoiser_of, kind_of, load_pipeline, resolve_base
from s2p_deploy.pipeline import Schedule, pipeline_with_engine, timesteps_of
from s2p_deploy.progress import silent
from s2p_deploy.recipe import recipe_from_data
from s2p_deploy.records import (
    CalibratedModel,
    ExportedGraph,
    LatentDataset,
    ValidationReport,
    parent_folder,
    write_artifact,
)
from s2p_deploy.shapes.classifier import CLASSIFIER
from s2p_deploy.timesteps import row_origins
from s2p_deploy.validation.agreement import REFERENCE, block_agreement, code_agreement
from s2p_deploy.validation.end_to_end import measure_end_to_end
from s2p_deploy.validation.gates import judge, verdict_of
from s2p_deploy.validation.latents import choose_latents, latents_of_walk, seen_on_walk
from s2p_deploy.validation.measurements import Measurements
from s2p_deploy.validation.numbers import Skipped
from s2p_deploy.validation.pictures import compare_drawings, draw
from s2p_deploy.validation.report import Drawings, render_html, write_pictures
from s2p_deploy.validation.summary import plain, summary
from s2p_deploy.validation.training_figures import read_training_log

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from diffusers import DiffusionPipeline

    from s2p_deploy.calib import FakeQuantDenoiser
    from s2p_deploy.engines import BoundRunner, Runner
    from s2p_deploy.families import BasePipeline
    from s2p_deploy.progress import Progress
    from s2p_deploy.recipe import Recipe
    from s2p_deploy.records import Engine, Manifest, PromptSet, TimestepTable
    from s2p_deploy.timesteps import Timesteps
    from s2p_deploy.validation.latents import ValidationLatents
    from s2p_deploy.validation.measurements import BlockAgreement, PictureComparison
    from s2p_deploy.validation.pictures import Drawing

_HALF_HINTS = {"bf16", "f16", "fp16"}
_LIBRARIES = ("s2p-deploy", "torch", "diffusers", "transformers", "numpy", "onnx", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Chain:
    """An engine and everything it was made from. ``dataset`` is None for a model that was not calibrated on one."""

    engine: Engine
    graph: ExportedGraph
    calibrated: CalibratedModel
    dataset: LatentDataset | None
    base: BasePipeline
    recipe: Recipe

    @property
    def guidance_scale(self) -> float:
        """The deployed guidance."""
        return self.recipe.sampling.guidance_scale or self.base.default_guidance

    @property
    def half(self) -> bool:
        """Whether the engine computes what is not INT8 in half precision."""
        return self.engine.dtype == "fp16" or self.engine.hint in _HALF_HINTS


def open_chain(
    engine: Engine, *, graph: Path | None = None, calib: Path | None = None, model: str | None = None
) -> Chain:
    """Finds and verifies what an engine was made from, by the manifests' hints or where it is said to be.

    Raises:
        InputError: something is not there. IntegrityError: what is there is something else.
    """
    exported = ExportedGraph.open(parent_folder(engine.folder, engine.manifest, "graph", graph))
    calibrated = CalibratedModel.open(parent_folder(exported.folder, exported.manifest, "calib", calib))
    with_dataset = "dataset" in calibrated.manifest.parents
    dataset = (
        LatentDataset.open(parent_folder(calibrated.folder, calibrated.manifest, "dataset")) if with_dataset else None
    )
    base = resolve_base(model or engine.manifest.base.source)
    if base.base.digest != engine.manifest.base.digest:
        raise IntegrityError(f"{base.base.source} is not the pipeline that {engine.folder} was made from: pass --model")
    return Chain(
        engine, exported, calibrated, dataset, base, recipe_from_data(engine.manifest.recipe, str(engine.folder))
    )


def validate(  # noqa: PLR0913 - what, where, and options by keyword
    chain: Chain,
    prompts: PromptSet,
    out: Path,
    *,
    pictures: int | None = None,
    schedules: tuple[Schedule, ...] = (),
    replace: bool = False,
    command: str = "",
    progress: Progress = silent,
) -> ValidationReport:
    """Asks the three questions of an engine and writes the report to ``out``.

    Args:
        chain: the engine, from :func:`open_chain`.
        prompts: held-out prompts; the first ``pictures`` are drawn.
        out: folder of the report.
        pictures: how many pictures (None: the recipe's).
        schedules: other schedules to draw on the same engine, reported and not gated.
        replace: whether a report at ``out`` may be replaced.
        command: the command line, for the report.
        progress: told about every part.

    Returns:
        The report. Its verdict is ``failed`` where a gate was not met and ``not verified`` where one could not be
        measured here (an engine that needs another device).

    Raises:
        InputError: ``out`` exists, or a schedule is not covered. MissingEnvironmentError: the engine cannot be loaded.
    """
    if out.exists() and not replace:
        raise InputError(f"{out} exists: choose another --out, or pass --force to replace it")
    chosen = prompts.first(pictures or chain.recipe.validation.pictures)
    found, drawings = measure(chain, chosen, schedules, progress)
    gates = judge(found, chain.recipe.validation.gates)
    data = _described(chain, chosen, command) | plain({"gates": gates, "verdict": verdict_of(gates)}) | summary(found)
    data["rows"] = _row_origins(chain, found)

    def fill(folder: Path) -> dict[str, Any]:
        (folder / "report.json").write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        training = read_training_log(chain.calibrated.folder)
        html = render_html(data, found, chain.graph, chain.engine.sites, drawings, training)
        (folder / "report.html").write_text(html, encoding="utf-8")
        if drawings is not None:
            write_pictures(drawings, folder / "pictures")
        return {"verdict": data["verdict"], "prompts": chosen.digest}

    engine = chain.engine
    write_artifact(
        out,
        kind="ValidationReport",
        base=engine.manifest.base,
        recipe=engine.manifest.recipe,
        parents={"engine": (engine.folder, engine.manifest)},
        fill=fill,
        replace=replace,
    )
    return ValidationReport.open(out)


def measure(
    chain: Chain, prompts: PromptSet, schedules: tuple[Schedule, ...] = (), progress: Progress = silent
) -> tuple[Measurements, Drawings | None]:
    """All measurements, and the drawings where the engine can run here."""
    pipe, fake_quant = load_pipeline(chain.base), fake_quant_denoiser(chain.calibrated)
    schedule, guidance = Schedule.of(chain.recipe.sampling), chain.guidance_scale
    schedules = tuple(replace(other, max_sequence_length=schedule.max_sequence_length) for other in schedules)
    with ExitStack() as stack:
        runner = _runner(chain, stack, [timesteps_of(pipe, other) for other in (schedule, *schedules)])
        reference = draw(pipe, prompts, schedule, guidance, stage="pictures, FP", progress=progress)
        latents = _latents(chain, pipe, reference, prompts)
        inside = _inside(chain, fake_quant, latents, runner, progress)
        if isinstance(runner, Skipped):
            return Measurements(**inside, end_to_end=runner, pictures=runner), None
        end_to_end = measure_end_to_end(_whole(pipe, chain.calibrated.timesteps), fake_quant, runner, latents)
        candidate_pipe = pipeline_with_engine(pipe, chain.engine, runner)
        candidate = draw(candidate_pipe, prompts, schedule, guidance, stage="pictures, engine", progress=progress)
        compared = compare_drawings(reference, candidate, prompts, schedule, guidance, CLASSIFIER)
        others = tuple(_compared(pipe, candidate_pipe, prompts, other, guidance, progress) for other in schedules)
    found = Measurements(**inside, end_to_end=end_to_end, pictures=compared, other_schedules=others)
    return found, Drawings(prompts, reference, candidate)


def _runner(chain: Chain, stack: ExitStack, schedules: Sequence[Timesteps]) -> BoundRunner | Skipped:
    able = backend_by_name(chain.engine.backend).capabilities()
    if not able.executes:
        return Skipped(able.missing or f"{chain.engine.backend} cannot execute here: it needs a GPU")
    return stack.enter_context(load_engine(chain.engine, chain.graph, schedules=schedules))


def _latents(chain: Chain, pipe: DiffusionPipeline, walk: Drawing, prompts: PromptSet) -> ValidationLatents:
    count = chain.recipe.validation.latents
    if chain.dataset is not None:
        return choose_latents(chain.dataset, count)
    texts = encode_prompts(pipe, prompts, chain.recipe.sampling.max_sequence_length)
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(chain.recipe.sampling.steps)
    sampler = Sampler(scheduler, call_rows(scheduler, chain.calibrated.timesteps))
    cond, uncond = texts.distinct[texts.cond], texts.distinct[texts.uncond]
    return latents_of_walk(seen_on_walk(sampler, walk.trajectory), np.asarray(sampler.rows[1:]), cond, uncond, count)


def _whole(pipe: DiffusionPipeline, timesteps: TimestepTable) -> Callable[..., torch.Tensor]:
    """The pipeline's own denoiser, time path and all, called as a hot one."""
    network = denoiser_of(pipe)
    kind, values = kind_of(network), torch.from_numpy(timesteps.timesteps).float()

    def answer(
        sample: torch.Tensor, rows: torch.Tensor, text: torch.Tensor, added_cond: torch.Tensor | None = None
    ) -> torch.Tensor:
        added = sample.new_zeros(len(sample), 0) if added_cond is None else added_cond
        return kind.answer(network, sample, values[rows], text, added)

    return answer


def _inside(
    chain: Chain,
    fake_quant: FakeQuantDenoiser,
    latents: ValidationLatents,
    runner: Runner | Skipped,
    progress: Progress,
) -> dict[str, Any]:
    """What is measured with the reference's own inputs, and what kind of engine it is."""
    engine, graph = chain.engine, chain.graph
    of_graph = block_agreement(fake_quant, graph, latents, *REFERENCE, progress)
    of_engine: tuple[BlockAgreement, ...] | Skipped = of_graph
    if isinstance(runner, Skipped):
        of_engine = runner
    elif (engine.backend, engine.hint) != REFERENCE:
        chosen = recorded_lowerings(engine, graph)
        of_engine = block_agreement(fake_quant, graph, latents, engine.backend, engine.hint, progress, lowerings=chosen)
    return {
        "quantized": not chain.recipe.is_float,
        "graph_half": graph.dtype == "fp16",
        "engine_half": chain.half,
        "points": code_agreement(fake_quant, graph, latents, progress),
        "graph_blocks": of_graph,
        "engine_blocks": of_engine,
    }


def _compared(
    reference: DiffusionPipeline,
    candidate: DiffusionPipeline,
    prompts: PromptSet,
    schedule: Schedule,
    guidance_scale: float,
    progress: Progress,
) -> PictureComparison:
    stage = f"pictures, {schedule.scheduler} {schedule.steps}"
    first, second = (
        draw(pipe, prompts, schedule, guidance_scale, stage=stage, progress=progress) for pipe in (reference, candidate)
    )
    return compare_drawings(first, second, prompts, schedule, guidance_scale, CLASSIFIER)


def _row_origins(chain: Chain, found: Measurements) -> list[dict[str, Any]]:
    """For every schedule that was drawn: on how many timesteps the scales were trained, interpolated and held."""
    drawn = () if isinstance(found.pictures, Skipped) else (found.pictures, *found.other_schedules)
    table = chain.engine.timesteps
    return [
        {"scheduler": one.schedule.scheduler or "pipeline's own", "steps": one.schedule.steps}
        | {kind: len(timesteps) for kind, timesteps in asdict(row_origins(one.timesteps, table)).items()}
        for one in drawn
    ]


def _described(chain: Chain, prompts: PromptSet, command: str) -> dict[str, Any]:
    """What was validated: names, digests, versions and sizes in bytes."""
    engine, graph, recipe = chain.engine, chain.graph, chain.recipe
    parts: dict[str, Manifest | None] = {
        "engine": engine.manifest,
        "graph": graph.manifest,
        "calib": chain.calibrated.manifest,
        "dataset": chain.dataset.manifest if chain.dataset else None,
    }
    return {
        "schema": 1,
        "recipe": {"name": recipe.name, "digest": recipe.digest(), "block_sqnr": recipe.validation.gates.block_sqnr},
        "base": asdict(engine.manifest.base),
        "engine": {
            "backend": engine.backend,
            "hint": engine.hint,
            "dtype": engine.dtype,
            "environment": engine.environment,
            "sites": [asdict(site) for site in engine.sites],
        },
        "digests": {name: manifest.digest for name, manifest in parts.items() if manifest}
        | {"base": engine.manifest.base.digest, "prompts": prompts.digest},
        "versions": {name: version for name in _LIBRARIES if (version := _version(name))},
        "command": command,
        "sizes": {
            "engine": _bytes([engine.folder / n for n in engine.engine_files] + [*engine.folder.glob("text.onnx*")]),
            "graph": _bytes(file for name in ("denoiser", "text") for file in graph.folder.glob(f"{name}.onnx*")),
            "base_denoiser": _bytes(chain.base.denoiser_folder.glob("*.safetensors")),
        },
    }


def _bytes(files: Any) -> int:  # noqa: ANN401 - any iterable of paths
    return sum(file.stat().st_size for file in files)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
