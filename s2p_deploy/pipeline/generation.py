"""Image generation with a stock pipeline, its denoiser an engine or in floating point: schedules, noise, sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from s2p_deploy.errors import InputError
from s2p_deploy.families import BasePipeline, denoiser_of, latent_shape_of, load_scheduler, with_denoiser
from s2p_deploy.families.pipelines import task_of
from s2p_deploy.families.text import is_sd3
from s2p_deploy.schedulers import on_host, scheduler_by_name, skipped_calls, with_steps

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from diffusers import DiffusionPipeline
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor

    from s2p_deploy.families.pictures import PictureInputs
    from s2p_deploy.recipe import Sampling
    from s2p_deploy.records import Prompt


@dataclass(frozen=True)
class Schedule:
    """How to sample.

    Attributes:
        steps: number of denoising steps.
        scheduler: its name (None: the pipeline's own).
        max_sequence_length: number of tokens of SD3's third text encoder, which other pipelines do not have.
        size: height and width in pixels (None: the size that the denoiser was trained on).
        strength: share of the schedule that is run where a picture is changed; others run all of it.

    Example:
        >>> open_pipeline("build/engine", schedules=[Schedule(20, "ddim")]).close()
        >>> Schedule.of(Recipe.load("w4a8").sampling).steps
        50
    """

    steps: int
    scheduler: str | None = None
    max_sequence_length: int = 256
    size: tuple[int, int] | None = None
    strength: float = 1.0

    @staticmethod
    def of(sampling: Sampling) -> Schedule:
        """Makes the schedule of a recipe, with the pipeline's own scheduler."""
        strength = 1.0 if sampling.strength is None else sampling.strength
        return Schedule(sampling.steps, max_sequence_length=sampling.max_sequence_length, strength=strength)


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
    whole: NDArray[np.float64] = with_steps(scheduler, schedule.steps).timesteps.double().numpy()
    return whole[skipped_calls(scheduler, schedule.steps, schedule.strength) :]


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
    inputs: PictureInputs | None = None,
) -> Image:
    """Generates one picture.

    Args:
        pipe: a stock pipeline; it stays as it is.
        prompt: its text and negative text.
        schedule: scheduler, steps and size.
        guidance_scale: strength of classifier-free guidance; 1 is none.
        seed: of all noise, also of what some schedulers add at every step (None: from the prompt's id).
        inputs: the one picture that is changed, with its mask, where the pipeline inpaints or refines.

    Raises:
        InputError: there is no such scheduler, the engine's table does not cover the schedule, or the engine does not
            take the size.
    """
    noise_seed = prompt.noise_seed if seed is None else seed
    arguments = call_arguments(pipe, [prompt], schedule, guidance_scale, inputs)
    noise = noise_arguments(pipe, [noise_seed], latent_size(pipe, schedule))
    picture: Image = with_schedule(pipe, schedule)(**arguments, **noise).images[0]
    return picture


def noise_arguments(
    pipe: DiffusionPipeline, seeds: Sequence[int], size: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Makes the keyword arguments of a stock pipeline that decide all its noise; each sample's by its own seed.

    ``size`` is height and width of the latents (None: the size that the denoiser was trained on).
    """
    # noise of later steps is another stream than the first noise, which has the seed itself
    generators = [torch.Generator().manual_seed(seed ^ (1 << 62)) for seed in seeds]
    if task_of(type(pipe).__name__) == "refining":
        return {"generator": generators}  # which takes given latents as noised already
    denoiser = denoiser_of(pipe)
    latents = initial_noise(seeds, denoiser.config, size).to(pipe.device, denoiser.dtype)
    return {"generator": generators, "latents": latents}


def picture_size(pipe: DiffusionPipeline, height: int | None, width: int | None) -> tuple[int, int] | None:
    """Completes a picture's height and width in pixels from the size that the denoiser was trained on.

    None where both are None.
    """
    if height is None and width is None:
        return None
    trained = trained_size(pipe)
    return height or trained[0], width or trained[1]


def trained_size(pipe: DiffusionPipeline) -> tuple[int, int]:
    """Returns height and width in pixels of the pictures that the denoiser was trained on."""
    _, height, width = latent_shape_of(dict(denoiser_of(pipe).config))
    return height * pipe.vae_scale_factor, width * pipe.vae_scale_factor


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
    pipe: DiffusionPipeline,
    prompts: Sequence[Prompt],
    schedule: Schedule,
    guidance_scale: float,
    inputs: PictureInputs | None = None,
) -> dict[str, Any]:
    """Makes the keyword arguments of a stock pipeline that generate pictures of ``prompts``.

    Raises:
        InputError: the pipeline inpaints or refines, and ``inputs`` are missing.
    """
    negatives = [prompt.negative for prompt in prompts]
    arguments: dict[str, Any] = {
        "prompt": [prompt.text for prompt in prompts],
        # without any negative prompt SDXL takes zeros, not the states of an empty text
        "negative_prompt": negatives if any(negatives) else None,
        "num_inference_steps": schedule.steps,
        "guidance_scale": guidance_scale,
    }
    if is_sd3(pipe):
        arguments["max_sequence_length"] = schedule.max_sequence_length
    task = task_of(type(pipe).__name__)
    if task == "text-to-image":
        return arguments | _size_arguments(schedule)
    if inputs is None:
        needed = "a picture and a mask" if task == "inpainting" else "the picture to refine"
        raise InputError(f"a {type(pipe).__name__} does not draw from text alone: give it {needed}")
    arguments |= {"image": inputs.pictures, "strength": schedule.strength}
    return arguments if task == "refining" else arguments | {"mask_image": inputs.masks} | _size_arguments(schedule)


def _size_arguments(schedule: Schedule) -> dict[str, int]:
    return {} if schedule.size is None else {"height": schedule.size[0], "width": schedule.size[1]}
