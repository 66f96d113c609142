"""The stage: a pipeline, a recipe and prompts give a CalibratedModel; killed at any time, a second start goes on."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file

from s2p_deploy import __version__
from s2p_deploy.calib.atomic import link_or_copy, link_or_copy_files, write_tensors, write_text
from s2p_deploy.calib.dataset import generate_dataset
from s2p_deploy.calib.plan import plan_from_recipe
from s2p_deploy.calib.quantized_denoiser import QuantizedDenoiser
from s2p_deploy.calib.scale_start import calibrated_rows, starting_act_scales, starting_weight_scales
from s2p_deploy.calib.summary import average_bits, training_summary
from s2p_deploy.calib.training import LOG, row_errors, train
from s2p_deploy.calib.training_state import ActScales, TrainingState
from s2p_deploy.calib.trajectories import call_rows
from s2p_deploy.errors import InputError
from s2p_deploy.families import discover_sites, hot_denoiser_from_unet, load_pipeline, time_table_from_unet
from s2p_deploy.progress import silent
from s2p_deploy.records import CalibratedModel, ScaleTable, TimestepTable, read_manifest, write_artifact
from s2p_deploy.records.precision_plan import write_plan
from s2p_deploy.records.scale_table import write_scale_table
from s2p_deploy.records.timestep_table import write_timestep_table
from s2p_deploy.timesteps import angles_from_alphas, spread_over_rows

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import StableDiffusionPipeline
    from numpy.typing import NDArray

    from s2p_deploy.families import BasePipeline, HotDenoiser
    from s2p_deploy.progress import Progress
    from s2p_deploy.recipe import Recipe
    from s2p_deploy.records import LatentDataset, PrecisionPlan, PromptSet, TimeTable

_KIND = "CalibratedModel"
_REQUEST = "request.json"
_DATASET = "dataset"
_SCALES = "starting_scales.safetensors"
_ACT_SCALES = "act_scales"
_WEIGHTS = "weights/"


@dataclass(frozen=True)
class _Job:
    """What was asked for: the recipe is resolved, the prompts are those that are used."""

    base: BasePipeline
    recipe: Recipe
    prompts: PromptSet
    out: Path
    replace: bool
    progress: Progress

    @property
    def partial(self) -> Path:
        """Where unfinished work stands."""
        return self.out.with_name(f"{self.out.name}.partial")

    def request(self) -> dict[str, Any]:
        """Everything that decides the bits of the result."""
        return {
            "recipe": self.recipe.digest(),
            "prompts": self.prompts.digest,
            "pipeline": self.base.base.digest,
            "number of threads": torch.get_num_threads(),
            "version": f"{__version__}, torch {torch.__version__}",
        }


@dataclass(frozen=True)
class _Start:
    """What every path begins with: the floating-point denoiser with its time table, and the plan over its sites."""

    pipe: StableDiffusionPipeline
    config: dict[str, Any]
    time_table: TimeTable
    hot: HotDenoiser
    plan: PrecisionPlan


def calibrate(
    base: BasePipeline,
    recipe: Recipe,
    prompts: PromptSet,
    out: Path,
    *,
    replace: bool = False,
    progress: Progress = silent,
) -> CalibratedModel:
    """Calibrates ``base`` and writes the CalibratedModel at ``out``, its LatentDataset in ``out/dataset``.

    Work in progress stands in ``<out>.partial``: a second start with the same request goes on there, and a finished
    ``out`` of the same request is returned as it is. Where the recipe leaves the guidance scale open, the pipeline's
    default is taken, and stored. ``replace`` drops what stands in the way and makes ``out`` anew.

    Raises:
        InputError: the recipe does not fit the pipeline, or ``out`` or its partial is of another request.
        S2PError: training diverged.
        IntegrityError: a finished artifact was changed.
    """
    resolved = _resolve(recipe, base)
    job = _Job(base, resolved, prompts.first(resolved.dataset.prompts), out, replace, progress)
    if out.exists() and not replace:
        return _finished(job)
    start = _start(job)  # before the claim: a recipe that does not fit leaves nothing behind
    _claim(job)
    if resolved.is_float:
        _calibrate_float(job, start)
    else:
        _calibrate_quantized(job, start)
    shutil.rmtree(job.partial)
    return CalibratedModel.open(out)


def _resolve(recipe: Recipe, base: BasePipeline) -> Recipe:
    if recipe.sampling.guidance_scale is not None:
        return recipe
    sampling = recipe.sampling.model_copy(update={"guidance_scale": base.default_guidance})
    return recipe.model_copy(update={"sampling": sampling})


def _finished(job: _Job) -> CalibratedModel:
    manifest = read_manifest(job.out, _KIND)
    wanted = (job.recipe.model_dump(mode="json"), job.base.base.digest, job.prompts.digest)
    if (manifest.recipe, manifest.base.digest, manifest.content.get("prompts")) != wanted:
        raise InputError(
            f"{job.out} was made from another recipe, prompts or pipeline:"
            " choose another --out, or pass --force to replace it"
        )
    if _left_behind(job) == job.request():
        shutil.rmtree(job.partial)  # killed between the last rename and the clearing away
    return CalibratedModel.open(job.out)


def _left_behind(job: _Job) -> dict[str, Any]:
    """The request of the work folder that stands there, or nothing."""
    file = job.partial / _REQUEST
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found


def _claim(job: _Job) -> None:
    """Makes the work folder of a request, or finds the one that was left behind."""
    request = job.request()
    if job.partial.exists():
        found = _left_behind(job)
        if found == request:
            return
        if found and not job.replace:
            other = next(name for name in request if found.get(name) != request[name])
            raise InputError(
                f"{job.partial} holds unfinished work with another {other}:"
                " start it as it was, choose another --out, or pass --force to drop it"
            )
        shutil.rmtree(job.partial)
    job.partial.mkdir(parents=True)
    write_text(job.partial / _REQUEST, json.dumps(request, indent=1) + "\n")


def _start(job: _Job) -> _Start:
    pipe = load_pipeline(job.base)
    if not hasattr(pipe.scheduler, "alphas_cumprod"):
        name = type(pipe.scheduler).__name__
        raise InputError(f"{name} has no alphas_cumprod: calibrate needs a variance-preserving scheduler")
    config = {key: value for key, value in pipe.unet.config.items() if not key.startswith("_")}
    table = time_table_from_unet(pipe.unet, pipe.scheduler.config.num_train_timesteps)
    hot = hot_denoiser_from_unet(pipe.unet, table).eval()
    return _Start(pipe, config, table, hot, plan_from_recipe(job.recipe, discover_sites(hot)))


def _calibrate_float(job: _Job, start: _Start) -> None:
    """Recipe fp: nothing is learned, so nothing is walked; its rows are the schedule's."""
    start.pipe.scheduler.set_timesteps(job.recipe.sampling.steps)
    rows = tuple(sorted(set(call_rows(start.pipe.scheduler))))
    denoiser = QuantizedDenoiser(start.hot, start.plan, {})
    scales = np.ones((len(rows), 0), np.float32)

    def fill(folder: Path) -> dict[str, Any]:
        return _fill(folder, job, start, denoiser, _scale_table(job, start, rows, scales))

    recipe = job.recipe.model_dump(mode="json")
    write_artifact(job.out, kind=_KIND, base=job.base.base, recipe=recipe, fill=fill, replace=job.replace)


def _calibrate_quantized(job: _Job, start: _Start) -> None:
    dataset = generate_dataset(
        start.pipe, start.hot, job.base.base, job.prompts, job.recipe, out=job.partial / _DATASET, progress=job.progress
    )
    state = _starting_state(job, start, dataset)
    train(state, dataset, job.recipe.training, job.partial, job.progress)
    trained = job.recipe.training.iterations > 0
    final = row_errors(state, dataset, job.progress, "final error") if trained else state.row_error
    rows = calibrated_rows(dataset)

    def fill(folder: Path) -> dict[str, Any]:
        link_or_copy(job.partial / LOG, folder / LOG)
        link_or_copy_files(dataset.folder, folder / _DATASET)
        table = _scale_table(job, start, rows, state.act_scales.table().numpy())
        training = training_summary(job.recipe.training.loss, rows, state.losses, state.row_error, final)
        content = _fill(folder, job, start, state.denoiser, table)
        return content | {"dataset": dataset.manifest.digest, "training": training}

    write_artifact(
        job.out,
        kind=_KIND,
        base=job.base.base,
        recipe=job.recipe.model_dump(mode="json"),
        fill=fill,
        parents={_DATASET: (job.out / _DATASET, dataset.manifest)},
        replace=job.replace,
    )


def _starting_state(job: _Job, start: _Start, dataset: LatentDataset) -> TrainingState:
    """The quantized denoiser with its closed-form scales, which are found once and kept in the work folder."""
    file = job.partial / _SCALES
    if not file.exists():
        found = {_WEIGHTS + name: scale for name, scale in starting_weight_scales(start.hot, start.plan).items()}
        latents = job.recipe.training.scale_latents
        found[_ACT_SCALES] = starting_act_scales(start.hot, start.plan, dataset, latents, job.progress)
        write_tensors(file, found)
    scales = load_file(file)
    static = [not point.timestep_dependent for point in start.plan.act_points]
    act_scales = ActScales(scales.pop(_ACT_SCALES), static)
    weight_scales = {name.removeprefix(_WEIGHTS): scale for name, scale in scales.items()}
    denoiser = QuantizedDenoiser(start.hot, start.plan, weight_scales)
    return TrainingState(denoiser, act_scales, calibrated_rows(dataset), job.recipe.training)


def _scale_table(
    job: _Job, start: _Start, rows: tuple[int, ...], scales: NDArray[np.float32]
) -> tuple[TimestepTable, ScaleTable]:
    """The rows, and the scales of all of them from those of the calibrated ones."""
    scheduler = start.pipe.scheduler
    config = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    angle = angles_from_alphas(scheduler.alphas_cumprod.double().numpy())
    timesteps = TimestepTable(type(scheduler).__name__, config, job.recipe.sampling.steps, rows, angle)
    return timesteps, ScaleTable(spread_over_rows(scales, timesteps), start.plan.point_names(), rows)


def _fill(
    folder: Path, job: _Job, start: _Start, denoiser: QuantizedDenoiser, tables: tuple[TimestepTable, ScaleTable]
) -> dict[str, Any]:
    """Writes the files that every CalibratedModel has; returns the part of the content that follows from them."""
    timesteps, scales = tables
    projections = torch.from_numpy(start.time_table.projections)
    write_tensors(folder / "weights.safetensors", denoiser.hot_state())
    write_tensors(folder / "weight_scales.safetensors", denoiser.weight_scales())
    write_tensors(folder / "time_table.safetensors", {"time_projections": projections})
    write_scale_table(scales, folder / "act_scales.safetensors")
    write_timestep_table(timesteps, folder / "timesteps.json")
    write_plan(start.plan, folder / "plan.yaml")
    write_text(folder / "denoiser_config.json", json.dumps(start.config, indent=1) + "\n")
    return {
        "time_slices": {name: list(columns) for name, columns in start.time_table.slices.items()},
        "tokens": start.pipe.tokenizer.model_max_length,
        "prompts": job.prompts.digest,
        "average_bits": average_bits(denoiser),
    }
