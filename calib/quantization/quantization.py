"""How a denoiser will be quantized and where training starts: transforms, the final plan, scales of weights and grids.

All of it is found once, from the floating-point denoiser and the dataset, and kept in the work folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from s2p_deploy.calib.dataset.sampler import Sampler
from s2p_deploy.calib.dataset.trajectories import call_rows
from s2p_deploy.calib.quantization.fit_transforms import fit_transforms, set_smoothing
from s2p_deploy.calib.quantization.low_bit import low_bit_plan
from s2p_deploy.calib.quantization.modelopt_start import modelopt_start, smoothed_by_modelopt
from s2p_deploy.calib.quantization.plan import mixed_plan, plan_from_recipe
from s2p_deploy.calib.quantization.progressive import GuidedSampling, progressive_grids
from s2p_deploy.calib.quantization.scale_start import (
    StartingGrids,
    calibrated_rows,
    starting_grids,
    starting_weight_scales,
)
from s2p_deploy.calib.quantization.sensitivity import site_sensitivities
from s2p_deploy.calib.start import sites_after
from s2p_deploy.families import apply_transforms, set_time_table
from s2p_deploy.records import TransformSpec
from s2p_deploy.records.precision_plan import read_plan, write_plan
from s2p_deploy.records.whole_files import write_tensors
from s2p_deploy.timesteps import rows_of_timesteps, scales_of_rows, with_schedules

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from s2p_deploy.calib.job import Job
    from s2p_deploy.calib.start import Start
    from s2p_deploy.families import Site
    from s2p_deploy.records import CalibratedModel, LatentDataset, PrecisionPlan

_PLAN = "plan.yaml"
_STARTS = "starting_scales.safetensors"
_WEIGHTS, _SCALES, _OFFSETS, _RELAXED = "weights/", "act_scales", "act_offsets", "relaxed"
Starts = tuple["dict[str, Tensor]", StartingGrids]


@dataclass(frozen=True)
class Quantization:
    """``spec`` of the transformed denoiser, the ``plan`` over its sites, and where both kinds of scales start."""

    spec: TransformSpec
    plan: PrecisionPlan
    weight_scales: dict[str, Tensor]
    grids: StartingGrids


def quantization_of(job: Job, start: Start, dataset: LatentDataset) -> Quantization:
    """Transforms ``start.hot`` in place, as its recipe says, and finds how it is quantized.

    Raises:
        InputError: what the recipe asks for does not fit the denoiser.
        S2PError: an activation is not finite.
    """
    if start.time_table is not None:
        set_time_table(start.hot, start.time_table)
    if job.initial is not None:
        return _continued(job.initial, start, dataset)
    if job.recipe.scales.calibrator == "own":
        return _own(job, start, dataset)
    return _by_modelopt(job, start, dataset)


def _continued(initial: CalibratedModel, start: Start, dataset: LatentDataset) -> Quantization:
    """Everything as a finished calibration left it; rows that it did not visit start at their interpolated scales."""
    hot = start.hot
    apply_transforms(hot, initial.transforms)
    hot.load_state_dict({name: torch.from_numpy(value) for name, value in initial.weights().items()})
    weight_scales = {name: torch.from_numpy(value) for name, value in initial.weight_scales().items()}
    timesteps = start.timesteps.timesteps[list(calibrated_rows(dataset))]
    bound = with_schedules(initial.timesteps, [timesteps], covered=False)
    scales = scales_of_rows(initial.scales, initial.timesteps, bound).scales
    grids = StartingGrids(torch.from_numpy(scales[rows_of_timesteps(timesteps, bound, covered=False)]))
    return Quantization(initial.transforms, initial.plan, weight_scales, grids)


def _own(job: Job, start: Start, dataset: LatentDataset) -> Quantization:
    hot, spec, scales = start.hot, start.spec, job.recipe.scales
    apply_transforms(hot, spec)
    fit_transforms(hot, spec, job.recipe.transforms, dataset, job.progress, latents=scales.latents)
    plan = _plan_once(job, start, start.plan, start.sites, dataset)

    def find() -> Starts:
        weight_scales = starting_weight_scales(hot, plan, scales)
        if not scales.progressive:
            return weight_scales, starting_grids(hot, plan, dataset, scales, job.progress)
        scheduler, guidance = start.pipe.scheduler, job.recipe.sampling.guidance_scale
        assert guidance is not None, "the recipe is resolved"
        scheduler.set_timesteps(job.recipe.sampling.steps)
        sampler = Sampler(scheduler, call_rows(scheduler, start.timesteps))
        sampling = GuidedSampling(job.prompts, dataset, sampler, guidance)
        return weight_scales, progressive_grids(hot, plan, weight_scales, sampling, scales, job.progress)

    return Quantization(spec, plan, *_starts_once(job, find))


def _by_modelopt(job: Job, start: Start, dataset: LatentDataset) -> Quantization:
    """Rivals: nvidia-modelopt's scales, and its smoothing in place of the recipe's own."""
    assert job.recipe.scales.calibrator != "own"
    found = modelopt_start(start.hot, start.plan, dataset, job.recipe.scales.calibrator, job.progress)
    spec = TransformSpec(smoothed=smoothed_by_modelopt(start.plan) if found.smoothing else ())
    apply_transforms(start.hot, spec)
    set_smoothing(start.hot, found.smoothing)
    sites = sites_after(spec, start.config, start.time_table or start.timesteps)
    plan = _plan_once(job, start, plan_from_recipe(job.recipe, sites), sites, dataset)
    rows = len(set(dataset.rows.tolist()))
    return Quantization(spec, plan, found.weight_scales(plan), found.grids(plan, rows))


def _plan_once(
    job: Job, start: Start, plan: PrecisionPlan, sites: tuple[Site, ...], dataset: LatentDataset
) -> PrecisionPlan:
    """``plan`` with mixed precision, unless the plan was given."""
    mixed, file = job.recipe.mixed, job.partial / _PLAN
    if job.plan is not None:
        return job.plan
    if not file.exists():
        if mixed.sensitivity != "none":
            seed = job.recipe.training.seed
            scores = site_sensitivities(
                start.hot, plan, start.timesteps, dataset, mixed, seed=seed, progress=job.progress
            )
            plan = mixed_plan(plan, sites, scores, mixed)
        write_plan(low_bit_plan(start.hot, plan, dataset, mixed, job.progress), file)
    return read_plan(file)


def _starts_once(job: Job, find: Callable[[], Starts]) -> Starts:
    file = job.partial / _STARTS
    if not file.exists():
        weight_scales, grids = find()
        optional = {_OFFSETS: grids.offsets, _RELAXED: grids.relaxed}
        named = {_WEIGHTS + name: scale for name, scale in weight_scales.items()} | {_SCALES: grids.scales}
        write_tensors(file, named | {name: value for name, value in optional.items() if value is not None})
    stored = load_file(file)
    weights = {name.removeprefix(_WEIGHTS): value for name, value in stored.items() if name.startswith(_WEIGHTS)}
    return weights, StartingGrids(stored[_SCALES], stored.get(_OFFSETS), stored.get(_RELAXED))
