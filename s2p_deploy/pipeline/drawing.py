"""Pictures from a stock pipeline, with an engine as its denoiser or in floating point: schedules, noise, sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers import StableDiffusion3Pipeline

from s2p_deploy.errors import InputError
from s2p_deploy.families import denoiser_of, latent_shape_of, with_denoiser
from s2p_deploy.pipeline.component import denoiser_from_engine
from s2p_deploy.schedulers import scheduler_by_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from diffusers import DiffusionPipeline
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor

    from s2p_deploy.engines import BoundRunner
    from s2p_deploy.recipe import Sampling
    from s2p_deploy.records import Engine, Prompt


@dataclass(frozen=True)
class Schedule:
    """How to sample: a scheduler by name (None: the pipeline's own) and a number of steps.

    ``max_sequence_length`` is that of SD3's third text encoder, which others do not have. ``size`` is height and width
    in pixels (None: what the denoiser was trained on).
    """

    steps: int
    scheduler: str | None = None
    max_sequence_length: int = 256
    size: tuple[int, int] | None = None

    @staticmethod
    def of(sampling: Sampling) -> Schedule:
        """A recipe's own."""
        return Schedule(sampling.steps, max_sequence_length=sampling.max_sequence_length)


def pipeline_with_engine(base: DiffusionPipeline, engine: Engine, runner: BoundRunner) -> DiffusionPipeline:
    """``base`` with a loaded engine as its denoiser. ``base`` stays as it is.

    Schedules with fractional timesteps must have been named when the engine was loaded::

        timesteps = timesteps_of(base, Schedule(20, "euler-karras"))
        pipe = pipeline_with_engine(base, engine, load_engine(engine, schedules=[timesteps]))
    """
    return with_denoiser(base, denoiser_from_engine(engine, runner))


def with_schedule(pipe: DiffusionPipeline, schedule: Schedule) -> DiffusionPipeline:
    """``pipe`` with a fresh scheduler of the asked kind, made from the noise schedule of its own.

    Raises:
        InputError: there is no scheduler of that name.
    """
    other = with_denoiser(pipe, denoiser_of(pipe))
    if schedule.scheduler is not None:
        other.scheduler = scheduler_by_name(schedule.scheduler, pipe.scheduler.config)
    return other


def timesteps_of(pipe: DiffusionPipeline, schedule: Schedule) -> NDArray[np.float64]:
    """Every timestep that ``pipe`` asks its denoiser for on a schedule, float64 [calls], in order.

    Raises:
        InputError: there is no scheduler of that name, or it has no such number of steps.
    """
    scheduler = with_schedule(pipe, schedule).scheduler
    try:
        scheduler.set_timesteps(schedule.steps)
    except ValueError as error:
        raise InputError(f"{type(scheduler).__name__} has no {schedule.steps} steps: {error}") from error
    timesteps: NDArray[np.float64] = scheduler.timesteps.double().numpy()
    return timesteps


def initial_noise(
    seeds: Sequence[int], denoiser_config: Mapping[str, Any], size: tuple[int, int] | None = None
) -> Tensor:
    """Standard normal noise float32 [n, C, H, W]; each sample depends on its own seed alone.

    ``size`` is H and W (None: what the denoiser was trained on).
    """
    channels, *trained = latent_shape_of(dict(denoiser_config))
    shape = (1, channels, *(size or trained))
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def generate(
    pipe: DiffusionPipeline, prompt: Prompt, *, schedule: Schedule, guidance_scale: float, seed: int | None = None
) -> Image:
    """One picture; its noise, that of schedulers that add some at every step too, comes from ``seed`` alone.

    Without a seed it comes from the prompt's id.

    Raises:
        InputError: no such scheduler, the engine's table does not cover the schedule, or it does not take the size.
    """
    own = prompt.noise_seed if seed is None else seed
    given = call_arguments(pipe, [prompt], schedule, guidance_scale)
    given["latents"] = initial_noise([own], denoiser_of(pipe).config, latent_size(pipe, schedule))
    given["latents"] = given["latents"].to(denoiser_of(pipe).dtype)
    picture: Image = with_schedule(pipe, schedule)(**given, generator=_later_noise(own)).images[0]
    return picture


def _later_noise(seed: int) -> torch.Generator:
    """For noise that is added at later steps: another stream than the first noise's, which has the seed itself."""
    return torch.Generator().manual_seed(seed ^ (1 << 62))


def picture_size(pipe: DiffusionPipeline, height: int | None, width: int | None) -> tuple[int, int] | None:
    """Height and width in pixels; one that is None is what the denoiser was trained on, as both are where both are."""
    if height is None and width is None:
        return None
    factor = pipe.vae_scale_factor
    _, *trained = latent_shape_of(dict(denoiser_of(pipe).config))
    return height or factor * trained[0], width or factor * trained[1]


def latent_size(pipe: DiffusionPipeline, schedule: Schedule) -> tuple[int, int] | None:
    """Height and width of the latents of a schedule's pictures; None for what the denoiser was trained on.

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
    """What a stock pipeline is called with to draw ``prompts``.

    Where no prompt has a negative one, none is given: SDXL takes zeros then, not the states of an empty text.
    """
    negatives = [prompt.negative for prompt in prompts]
    pads = isinstance(pipe, StableDiffusion3Pipeline)
    own = {"max_sequence_length": schedule.max_sequence_length} if pads else {}
    if schedule.size is not None:
        own |= {"height": schedule.size[0], "width": schedule.size[1]}
    return own | {
        "prompt": [prompt.text for prompt in prompts],
        "negative_prompt": negatives if any(negatives) else None,
        "num_inference_steps": schedule.steps,
        "guidance_scale": guidance_scale,
    }
