"""Which of the states that training went through is kept: the one whose own trajectories end nearest the teacher's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from s2p_deploy.calib.dataset.sampler_walk import SamplerInputs, final_latents, sampler_inputs

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

    from s2p_deploy.calib.dataset.sampler_walk import Denoise
    from s2p_deploy.families import HotDenoiser
    from s2p_deploy.recipe import Recipe
    from s2p_deploy.records import PromptSet


@dataclass(frozen=True)
class HeldOut:
    """Prompts that nothing learns from, and where the teacher takes them: ``final`` float32 [n, C, H, W]."""

    inputs: SamplerInputs
    final: Tensor

    def to(self, device: torch.device) -> HeldOut:
        """The same on a device."""
        return HeldOut(self.inputs.to(device), self.final.to(device))


def held_out_walk(pipe: DiffusionPipeline, teacher: HotDenoiser, prompts: PromptSet, recipe: Recipe) -> HeldOut:
    """Walks the floating-point ``teacher`` (on the CPU) over held-out ``prompts`` under the recipe's sampling."""
    inputs = sampler_inputs(pipe, teacher, prompts, recipe)
    return HeldOut(inputs, final_latents(teacher, inputs))


def trajectory_error(denoise: Denoise, held_out: HeldOut) -> float:
    """Median over the prompts of the relative error (of 2-norms) of the last latents. NaN where latents are."""
    found = final_latents(denoise, held_out.inputs)
    errors = (found - held_out.final).flatten(1).norm(dim=1) / held_out.final.flatten(1).norm(dim=1)
    return float(torch.quantile(errors, 0.5))
