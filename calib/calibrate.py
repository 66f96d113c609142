"""The stage: a pipeline, a recipe and prompts give a CalibratedModel; killed at any time, a second start goes on."""

from __future__ import annotations

import hashlib
import json
import shutil
from typing import TYPE_CHECKING, Any

import torch

from s2p_deploy.calib.dataset.generate import generate_dataset
from s2p_deploy.calib.dataset.shards import dataset_request, open_finished
from s2p_deploy.calib.job import KIND, Job, claim, finished
from s2p_deploy.calib.model_files import Found, write_model
from s2p_deploy.calib.quantization.quantization import Quantization, quantization_of
from s2p_deploy.calib.quantization.scale_start import StartingGrids, calibrated_rows
from s2p_deploy.calib.quantized_denoiser import QuantizedDenoiser
from s2p_deploy.calib.start import start_of
from s2p_deploy.calib.streaming.stream import stream_model, streams
from s2p_deploy.calib.summary import training_summary
from s2p_deploy.calib.training.act_scales import ActScales
from s2p_deploy.calib.training.prepare import setting_of, teacher_of
from s2p_deploy.calib.training.state import TrainingState
from s2p_deploy.calib.training.train import LOG, TrainingOutcome, train
from s2p_deploy.errors import InputError
from s2p_deploy.progress import silent
from s2p_deploy.records import CalibratedModel, PromptSet, write_artifact
from s2p_deploy.records.lock import claimed
from s2p_deploy.records.whole_files import link_or_copy, link_or_copy_files

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from s2p_deploy.calib.dataset.estimate import Estimate
    from s2p_deploy.calib.start import Start
    from s2p_deploy.families import BasePipeline
    from s2p_deploy.progress import Progress
    from s2p_deploy.recipe import Recipe
    from s2p_deploy.records import PrecisionPlan

_DATASET = "dataset"
_NO_PROMPTS = PromptSet(())


def calibrate(  # noqa: PLR0913 - what is calibrated, from what, to where, and options by keyword
    base: BasePipeline,
    recipe: Recipe,
    prompts: PromptSet | None,
    out: Path,
    *,
    plan: PrecisionPlan | None = None,
    initial: CalibratedModel | None = None,
    dataset: Path | None = None,
    device: str = "cpu",
    replace: bool = False,
    progress: Progress = silent,
    tell: Callable[[Estimate], None] | None = None,
) -> CalibratedModel:
    """Calibrates ``base`` and writes the CalibratedModel at ``out``, its LatentDataset in ``out/dataset``.

    Work in progress stands in ``<out>.partial``: a second start with the same request goes on there, and a finished
    ``out`` of the same request is returned as it is. Where the recipe leaves the guidance scale open, the pipeline's
    default is taken, and stored. A recipe that looks at no activation (``fp``, ``ptq-stream``) is streamed: it reads
    one weight at a time, walks no prompt and leaves nothing behind where it is stopped.

    Args:
        base: the floating-point pipeline.
        recipe: what to do.
        prompts: the first are walked for the dataset, those after them select the checkpoint; a streamed recipe reads
            none.
        out: folder of the artifact.
        plan: stands in place of the plan that the recipe gives.
        initial: a finished model of the same pipeline to go on from, with its plan and its transforms; such as for a
            short training on another schedule. With ``scales.activations: given`` a model, of another pipeline too,
            whose activation scales are taken.
        dataset: the LatentDataset of this pipeline, these prompts and the recipe's sections, made there where there is
            none; recipes that agree in :func:`dataset_name` can share it. None: made for this calibration alone.
        device: where training runs; the walk is made there too.
        replace: drops what stands in the way and makes ``out`` anew.
        progress: told about every part.
        tell: given the size and time of a dataset that has to be made, before it is.

    Raises:
        InputError: the recipe, the plan or the prompts do not fit, or ``out`` or its partial is of another request or
            at work in another process.
        S2PError: training diverged.
        IntegrityError: a finished artifact was changed.
    """
    resolved = recipe.with_guidance(base.default_guidance)
    streamed = streams(resolved, plan)
    if initial is not None and not streamed:
        _check_initial(initial, base, plan)
    used, selection = (_NO_PROMPTS, _NO_PROMPTS) if streamed else _prompts(resolved, prompts)
    job = Job(base, resolved, used, selection, out, plan, initial, dataset, device, replace, progress)
    with claimed(job.partial):
        if out.exists() and not replace:
            return finished(job)
        if streamed:
            stream_model(job)
        else:
            _calibrate_from_dataset(job, tell)
    return CalibratedModel.open(out)


def dataset_name(recipe: Recipe) -> str:
    """A short name that recipes share whose datasets are the same for one pipeline and one prompt file."""
    sections = {"sampling": recipe.sampling.model_dump(), "dataset": recipe.dataset.model_dump()}
    return hashlib.sha256(json.dumps(sections, sort_keys=True).encode()).hexdigest()[:16]


def _check_initial(initial: CalibratedModel, base: BasePipeline, plan: PrecisionPlan | None) -> None:
    if initial.manifest.base.digest != base.base.digest:
        raise InputError(f"{initial.folder} was made from another pipeline than {base.base.source}: calibrate anew")
    if initial.simulation is not None or plan is not None:
        reason = "a plan was given too" if plan is not None else "it exists in simulation only"
        raise InputError(f"cannot go on from {initial.folder}: {reason}")


def _prompts(recipe: Recipe, prompts: PromptSet | None) -> tuple[PromptSet, PromptSet]:
    """Those that are walked, and those that select the checkpoint."""
    if prompts is None:
        raise InputError(f"recipe {recipe.name} walks prompts: pass --prompts FILE")
    first, count = recipe.dataset.prompts, recipe.training.selection.prompts
    if count and len(prompts.prompts) < first + count:
        raise InputError(
            f"recipe {recipe.name} walks {first} prompts and selects by {count} others, of {len(prompts.prompts)}:"
            " give more prompts, or lower dataset.prompts or training.selection.prompts"
        )
    return prompts.first(first), PromptSet(prompts.prompts[first : first + count])


def _calibrate_from_dataset(job: Job, tell: Callable[[Estimate], None] | None) -> None:
    if job.dataset is not None:  # before the claim, as what follows: what does not fit leaves nothing behind
        open_finished(dataset_request(job.base, job.recipe, job.prompts, job.dataset))
    start = start_of(job)
    claim(job)
    dataset = generate_dataset(
        start.pipe,
        start.hot,
        job.base.base,
        job.prompts,
        job.recipe,
        out=job.dataset or job.partial / _DATASET,
        progress=job.progress,
        device=torch.device(job.device),
        tell=tell,
    )
    teacher = teacher_of(job, start)
    quantization = quantization_of(job, start, dataset)
    rows = calibrated_rows(dataset)
    state = _starting_state(job, start, quantization, rows)
    setting = setting_of(job, start, state, quantization.plan, teacher)
    outcome = train(state, dataset, setting, job.partial, job.progress)
    grids = quantization.grids
    trained = StartingGrids(state.act_scales.table(), grids.offsets, grids.relaxed)
    found = Found(state.denoiser, quantization.spec, rows, trained)

    def fill(folder: Path) -> dict[str, Any]:
        link_or_copy(job.partial / LOG, folder / LOG)
        link_or_copy_files(dataset.folder, folder / _DATASET)
        content = write_model(folder, job, start, found)
        return content | {"dataset": dataset.manifest.digest, "training": _summary(job, rows, outcome)}

    write_artifact(
        job.out,
        kind=KIND,
        base=job.base.base,
        recipe=job.recipe.model_dump(mode="json"),
        fill=fill,
        parents={_DATASET: (job.out / _DATASET, dataset.manifest)},
        replace=job.replace,
    )
    shutil.rmtree(job.partial)


def _starting_state(job: Job, start: Start, quantization: Quantization, rows: tuple[int, ...]) -> TrainingState:
    one_for_all = job.recipe.scales.timesteps != "each" or job.recipe.scales.calibrator != "own"
    static = [one_for_all or not point.timestep_dependent for point in quantization.plan.act_points]
    grids = quantization.grids
    denoiser = QuantizedDenoiser(start.hot, quantization.plan, quantization.weight_scales)
    act_scales = ActScales(grids.scales, static, grids.offsets, grids.relaxed)
    return TrainingState(denoiser, act_scales, torch.tensor(rows))


def _summary(job: Job, rows: tuple[int, ...], outcome: TrainingOutcome) -> dict[str, Any]:
    selections = [[tried.iteration, tried.error] for tried in outcome.selections]
    summary = training_summary(rows, outcome.start, outcome.final)
    return {"iterations": len(outcome.iterations), "loss": job.recipe.training.loss, "selections": selections} | summary
