"""What a recipe's training needs beside its dataset: a teacher, held-out trajectories, the rows' influence."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from s2p_deploy.calib.dataset.sampler_walk import sampler_inputs
from s2p_deploy.calib.quantization.plan import SENSITIVE
from s2p_deploy.calib.training.row_influence import row_influence
from s2p_deploy.calib.training.selection import held_out_walk
from s2p_deploy.calib.training.setting import TrainingSetting
from s2p_deploy.families import apply_transforms
from s2p_deploy.records.whole_files import write_tensors
from s2p_deploy.timesteps import angles_of_timesteps

if TYPE_CHECKING:
    from torch import Tensor

    from s2p_deploy.calib.job import Job
    from s2p_deploy.calib.start import Start
    from s2p_deploy.calib.training.selection import HeldOut
    from s2p_deploy.calib.training.state import TrainingState
    from s2p_deploy.families import HotDenoiser
    from s2p_deploy.records import PrecisionPlan, TimestepTable

_INFLUENCE = "row_influence"
_INFLUENCE_PROMPTS = 8


def teacher_of(job: Job, start: Start) -> HotDenoiser | None:
    """A copy of the floating-point denoiser with the trained one's module paths, where training looks at one."""
    training = job.recipe.training
    if training.features.targets == "none" and training.loss != "trajectory" and not training.selection.prompts:
        return None
    teacher = copy.deepcopy(start.hot)
    apply_transforms(teacher, start.spec if job.initial is None else job.initial.transforms)  # exact while fresh
    return teacher.requires_grad_(requires_grad=False)


def setting_of(
    job: Job, start: Start, state: TrainingState, plan: PrecisionPlan, teacher: HotDenoiser | None
) -> TrainingSetting:
    """The setting of a job's training; ``state`` is as it starts.

    Raises:
        InputError: the recipe asks for what it does not prepare, such as a loss on sensitive sites without any.
    """
    guidance = job.recipe.sampling.guidance_scale
    assert guidance is not None, "the recipe is resolved"
    scores = {site.site: site.sensitivity for site in plan.sites if site.sensitivity is not None}
    return TrainingSetting(
        training=job.recipe.training,
        guidance_scale=guidance,
        noise_levels=_noise_levels(start.timesteps),
        influence=_influence(job, start, state, teacher),
        teacher=teacher if job.recipe.training.features.targets != "none" else None,
        sensitive=tuple(site.site for site in plan.sites if site.rule == SENSITIVE),
        sensitivities=scores or None,
        held_out=_held_out(job, start, teacher),
        device=torch.device(job.device),
    )


def _noise_levels(timesteps: TimestepTable) -> Tensor:
    angles = torch.from_numpy(angles_of_timesteps(timesteps.timesteps, timesteps))
    return angles if timesteps.flow_matching else angles.tan()


def _held_out(job: Job, start: Start, teacher: HotDenoiser | None) -> HeldOut | None:
    if not job.recipe.training.selection.prompts:
        return None
    assert teacher is not None, "selection asks for one"
    return held_out_walk(start.pipe, teacher, job.selection, job.recipe)


def _influence(job: Job, start: Start, state: TrainingState, teacher: HotDenoiser | None) -> Tensor | None:
    """Measured once, on some of the dataset's prompts, and kept in the work folder."""
    if job.recipe.training.loss != "trajectory":
        return None
    assert teacher is not None, "the loss asks for one"
    file = job.partial / f"{_INFLUENCE}.safetensors"
    if not file.exists():
        inputs = sampler_inputs(start.pipe, teacher, job.prompts.first(_INFLUENCE_PROMPTS), job.recipe)
        write_tensors(file, {_INFLUENCE: row_influence(teacher, state, inputs, job.progress)})
    return load_file(file)[_INFLUENCE]
