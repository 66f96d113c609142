"""Image generation with a stock pipeline, its denoiser an engine or in floating point: schedules, noise, sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers import StableDiffusion3Pipeline

from s2p_deploy.errors import InputError
from s2p_deploy.families import (
    BasePipeline,
    denoiser_of,
    latent_shape_of,
    load_scheduler,
    long_prompt_embeds,
    text_tokens,
    with_denoiser,
)
from s2p_deploy.schedulers import on_host, scheduler_by_name, with_steps

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from diffusers import DiffusionPipeline
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor

    from s2p_deploy.recipe import Sampling
    from s2p_deploy.records import Prompt, ShapeProfile


@dataclass(frozen=True)
class Schedule:
    """How to sample.

    Attributes:
        steps: number of denoising steps.
        scheduler: its name (None: the pipeline's own).
        max_sequence_length: number of tokens of SD3's third text encoder, which other pipelines do not have.
        size: height and width in pixels (None: the size that the denoiser was trained on).

    Example:
        >>> open_pipeline("build/engine", schedules=[Schedule(20, "ddim")]).close()
        >>> Schedule.of(Recipe.load("w4a8").sampling).steps
        50
    """

    steps: int
    scheduler: str | None = None
    max_sequence_length: int = 256
    size: tuple[int, int] | None = None

    @staticmethod
    def of(sampling: Sampling) -> Schedule:
        """Makes the schedule of a recipe, with the pipeline's own scheduler."""
        return Schedule(sampling.steps, max_sequence_length=sampling.max_sequence_length)


def with_schedule(pipe: DiffusionPipeline, schedule: Schedule) -> DiffusionPipeline:
    """Makes a pipeline with a fresh scheduler of the schedule, which has the noise schedule of ``pipe``'s own.

    Raises:
        InputError: there is no scheduler of that name, or it is not for such a pipeline.
    """
    other = with_denoiser(pipe, denoiser_of(pipe))
    if schedule.scheduler is not None:
        other.scheduler = scheduler_by_name(schedule.scheduler, pipe.scheduler)
    other.scheduler = on_host(other.scheduler)
    return other


def timesteps_of(source: DiffusionPipeline | BasePipeline, schedule: Schedule) -> NDArray[np.float64]:
    """Lists the timesteps of every denoiser call that a pipeline makes on a schedule, float64 [calls], in order.

    Of a pipeline on disk nothing but the scheduler is read.

    Raises:
        InputError: there is no scheduler of that name, it is not for such a pipeline, or as
            :func:`s2p_deploy.schedulers.with_steps`.
    """
    own = load_scheduler(source) if isinstance(source, BasePipeline) else source.scheduler
    scheduler = own if schedule.scheduler is None else scheduler_by_name(schedule.scheduler, own)
    timesteps: NDArray[np.float64] = with_steps(scheduler, schedule.steps).timesteps.double().numpy()
    return timesteps


def initial_noise(
    seeds: Sequence[int], denoiser_config: Mapping[str, Any], size: tuple[int, int] | None = None
) -> Tensor:
    """Draws standard normal noise float32 [n, C, H, W] on the CPU; each sample depends on its own seed alone.

    ``size`` is H and W (None: the size that the denoiser was trained on).
    """
    channels, *trained = latent_shape_of(dict(denoiser_config))
    shape = (1, channels, *(size or trained))
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def generate(
    pipe: DiffusionPipeline,
    prompt: Prompt,
    *,
    schedule: Schedule,
    guidance_scale: float,
    seed: int | None = None,
    long_prompts: bool = False,
) -> Image:
    """Generates one picture.

    Args:
        pipe: a stock pipeline; it stays as it is.
        prompt: its text and negative text.
        schedule: scheduler, steps and size.
        guidance_scale: strength of classifier-free guidance; 1 is none.
        seed: of all noise, also of what some schedulers add at every step (None: from the prompt's id).
        long_prompts: reads texts that are longer than what the encoders read at once in chunks, and does not cut them.

    Raises:
        InputError: there is no such scheduler, the engine's table does not cover the schedule, or the engine does not
            take the size, or a text of so many chunks.
    """
    noise_seed = prompt.noise_seed if seed is None else seed
    denoiser = denoiser_of(pipe)
    latents = initial_noise([noise_seed], denoiser.config, latent_size(pipe, schedule)).to(denoiser.dtype)
    # noise of later steps is another stream than the first noise, which has the seed itself
    generator = torch.Generator().manual_seed(noise_seed ^ (1 << 62))
    arguments = call_arguments(pipe, [prompt], schedule, guidance_scale)
    if long_prompts:
        del arguments["prompt"], arguments["negative_prompt"]
        arguments |= _chunked(pipe, prompt, schedule, guided=guidance_scale > 1)
    picture: Image = with_schedule(pipe, schedule)(**arguments, latents=latents, generator=generator).images[0]
    return picture


def picture_size(pipe: DiffusionPipeline, height: int | None, width: int | None) -> tuple[int, int] | None:
    """Completes a picture's height and width in pixels from the size that the denoiser was trained on.

    None where both are None.
    """
    if height is None and width is None:
        return None
    factor = pipe.vae_scale_factor
    _, *trained = latent_shape_of(dict(denoiser_of(pipe).config))
    return height or factor * trained[0], width or factor * trained[1]


def latent_size(pipe: DiffusionPipeline, schedule: Schedule) -> tuple[int, int] | None:
    """Returns height and width of the latents of a schedule's pictures; None for the size trained on.

    Raises:
        InputError: a size in pixels is no multiple of what the autoencoder makes of one latent.
    """
    if schedule.size is None:
        return None
    height, width = schedule.size
    factor = pipe.vae_scale_factor
    if height % factor or width % factor:
        raise InputError(f"a picture of {height}x{width} pixels: height and width must be multiples of {factor}")
    return height // factor, width // factor


def call_arguments(
    pipe: DiffusionPipeline, prompts: Sequence[Prompt], schedule: Schedule, guidance_scale: float
) -> dict[str, Any]:
    """Makes the keyword arguments of a stock pipeline that generate pictures of ``prompts``."""
    negatives = [prompt.negative for prompt in prompts]
    arguments: dict[str, Any] = {
        "prompt": [prompt.text for prompt in prompts],
        # without any negative prompt SDXL takes zeros, not the states of an empty text
        "negative_prompt": negatives if any(negatives) else None,
        "num_inference_steps": schedule.steps,
        "guidance_scale": guidance_scale,
    }
    if isinstance(pipe, StableDiffusion3Pipeline):
        arguments["max_sequence_length"] = schedule.max_sequence_length
    if schedule.size is not None:
        arguments["height"], arguments["width"] = schedule.size
    return arguments


def _chunked(pipe: DiffusionPipeline, prompt: Prompt, schedule: Schedule, *, guided: bool) -> dict[str, Tensor]:
    """Encodes a prompt of any length; texts are filled up to the fewest tokens that an engine takes."""
    profile: ShapeProfile | None = getattr(denoiser_of(pipe), "profile", None)
    one = text_tokens(pipe, schedule.max_sequence_length)
    fewest = 1 if profile is None or profile.tokens is None else math.ceil(profile.tokens.minimum / one)
    third = schedule.max_sequence_length
    return long_prompt_embeds(
        pipe, prompt.text, prompt.negative, guided=guided, fewest=fewest, max_sequence_length=third
    )
