"""The LCM kind: the bundled UNet with a guidance embedding, distilled to draw in 4 steps without a second branch.

Consistency distillation (arXiv 2310.04378) with its targets in full: all points of one trajectory of the teacher lead
to the same last latents, so those are what the student learns to predict from each of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from autoencoder import BETAS, DENOISER_BATCH
from diffusers import DDIMScheduler, LatentConsistencyModelPipeline, LCMScheduler, UNet2DConditionModel
from text_encoders import encode_captions
from training import Schedule

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from diffusers import DiffusionPipeline, StableDiffusionPipeline
    from text_encoders import TextStates
    from torch import Tensor

SCHEDULE = Schedule(iterations=400, peak=4e-4, warmup=50, ema=0.98, weight_decay=0.01)
GUIDANCE_SCALE = 2.0
EMBEDDED = 32  # channels of the guidance embedding
GUIDANCES = (1.0, 4.0)  # drawn uniformly
TRAJECTORIES, AT_ONCE = 600, 100
STEPS = 25  # of the teacher; a schedule of the student takes some of them
MAX_WEIGHT = 200.0  # of the error of epsilon, which is to be that of x0


def assemble(_: Path, base: StableDiffusionPipeline) -> LatentConsistencyModelPipeline:
    """Assembles the pipeline with a UNet that starts as the base's and does not look at the guidance."""
    unet = UNet2DConditionModel.from_config(dict(base.unet.config) | {"time_cond_proj_dim": EMBEDDED})
    silent = {"time_embedding.cond_proj.weight": torch.zeros_like(unet.time_embedding.cond_proj.weight)}
    unet.load_state_dict(base.unet.state_dict() | silent)
    scheduler = LCMScheduler(**BETAS, original_inference_steps=STEPS, clip_sample=False)
    parts = base.components | {"unet": unet.to(memory_format=torch.channels_last), "scheduler": scheduler}
    return LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)


def loss(
    pipe: LatentConsistencyModelPipeline, _latents: Tensor, captions: list[str]
) -> Callable[[torch.Generator], Tensor]:
    """Returns a function of the error of x0 at random points of the teacher's trajectories."""
    text, empty = encode_captions(pipe, captions[:TRAJECTORIES])
    walked = teacher_trajectories(pipe, text, empty)
    embedded = pipe.get_guidance_scale_embedding(walked.guidance - 1, EMBEDDED)
    alphas = pipe.scheduler.alphas_cumprod

    def loss_of(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(TRAJECTORIES, (DENOISER_BATCH,), generator=generator)
        call = torch.randint(STEPS, (DENOISER_BATCH,), generator=generator)
        noisy, timesteps = walked.points[call, chosen], walked.timesteps[call]
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        target = (noisy - alpha.sqrt() * walked.last[chosen]) / (1 - alpha).sqrt()
        predicted = pipe.unet(
            noisy.to(memory_format=torch.channels_last),
            timesteps,
            text.states[chosen].float(),
            timestep_cond=embedded[chosen],
        ).sample
        weight = (1 / alpha).clamp(max=MAX_WEIGHT)
        return (weight * (predicted - target) ** 2).mean()

    return loss_of


@dataclass(frozen=True)
class Trajectories:
    """``points`` float32 [steps, n, 4, 8, 8] at ``timesteps`` int64 [steps], ``last`` [n, ...], ``guidance`` [n]."""

    points: Tensor
    timesteps: Tensor
    last: Tensor
    guidance: Tensor


@torch.no_grad()
def teacher_trajectories(
    pipe: DiffusionPipeline, text: TextStates, empty: TextStates, guidances: tuple[float, float] = GUIDANCES
) -> Trajectories:
    """Walks the untrained student, which is the teacher, from noise to pictures, with guidance between two scales."""
    generator = torch.Generator().manual_seed(5)
    low, high = guidances
    guidance = low + (high - low) * torch.rand(TRAJECTORIES, generator=generator)
    noise = torch.randn(TRAJECTORIES, 4, 8, 8, generator=generator)
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing")
    scheduler.set_timesteps(STEPS)
    points, last = [], []
    for start in range(0, TRAJECTORIES, AT_ONCE):
        some = slice(start, start + AT_ONCE)
        latents, walked = noise[some], []
        states = torch.cat([text.states[some], empty.states.expand(AT_ONCE, -1, -1)]).float()
        scale = guidance[some].view(-1, 1, 1, 1)
        for timestep in scheduler.timesteps:
            walked.append(latents)
            cond, uncond = pipe.unet(torch.cat([latents, latents]), timestep, states).sample.chunk(2)
            latents = scheduler.step(uncond + scale * (cond - uncond), timestep, latents).prev_sample
        points.append(torch.stack(walked))
        last.append(latents)
    return Trajectories(torch.cat(points, 1), scheduler.timesteps, torch.cat(last), guidance)
