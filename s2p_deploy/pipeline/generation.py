"""Image generation with a stock pipeline, its denoiser an engine or in floating point: schedules, noise, sizes."""

from __future__ import annotations

import inspect
import math
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

import torch

from s2p_deploy.context import MOST_SEED
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
from s2p_deploy.families.controlnets import with_controlnets
from s2p_deploy.families.model_family import has_branches
from s2p_deploy.families.pipelines import check_draws_from_text, for_task, task_of
from s2p_deploy.families.text import is_sd3
from s2p_deploy.pipeline.components import EngineDenoiser
from s2p_deploy.pipeline.control import check_controls, control_arguments
from s2p_deploy.pipeline.ip_adapter import prompted
from s2p_deploy.recipe import MOST_GUIDANCE
from s2p_deploy.records import Span
from s2p_deploy.schedulers import on_host, scheduler_by_name, skipped_calls, with_steps

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from diffusers import DiffusionPipeline, ModelMixin
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor

    from s2p_deploy.families.pictures import PictureInputs
    from s2p_deploy.pipeline.control import Control
    from s2p_deploy.pipeline.ip_adapter import ImagePrompt
    from s2p_deploy.pipeline.start_picture import StartPicture
    from s2p_deploy.recipe import Sampling
    from s2p_deploy.records import Prompt, ShapeProfile

_SD3_INPAINTING = {16, 33}  # channels that a transformer may read: latents, or mask and masked picture too


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


def generate(  # noqa: PLR0913 - what is drawn, and how by keyword
    pipe: DiffusionPipeline,
    prompt: Prompt,
    *,
    schedule: Schedule,
    guidance_scale: float,
    seed: int | None = None,
    long_prompts: bool = False,
    start: StartPicture | None = None,
    controls: Sequence[Control] = (),
    images: Sequence[ImagePrompt] = (),
) -> Image:
    """Generates one picture.

    Args:
        pipe: a stock text-to-image pipeline; it stays as it is.
        prompt: its text and negative text.
        schedule: scheduler, steps and size.
        guidance_scale: strength of classifier-free guidance; 1 is none.
        seed: of all noise, also of what some schedulers add at every step (None: from the prompt's id).
        long_prompts: reads texts that are longer than what the encoders read at once in chunks, and does not cut them.
        start: the picture to start from, whose size the schedule's is then (None: noise alone).
        controls: ControlNets that act, with their pictures.
        images: IP-Adapters that act, with their pictures.

    Raises:
        InputError: there is no such scheduler, the engine's table does not cover the schedule, or the engine does not
            take the size, a text of so many chunks, ControlNets or image prompts; the seed or the guidance scale is out
            of range; as :func:`timesteps_from_start`.
    """
    noise_seed = prompt.noise_seed if seed is None else seed
    if not 0 <= noise_seed <= MOST_SEED:
        raise InputError(f"seed {noise_seed} is out of range: give one from 0 to {MOST_SEED}")
    if not 0 <= guidance_scale <= MOST_GUIDANCE:
        raise InputError(
            f"a guidance scale of {guidance_scale:g} is out of range: give one from 0 to {MOST_GUIDANCE:g}"
        )
    if images:
        guided = has_branches(dict(denoiser_of(pipe).config), guidance_scale)
        pipe = with_denoiser(pipe, prompted(denoiser_of(pipe), images, guided=guided))
    denoiser = denoiser_of(pipe)
    arguments = _text_arguments(pipe, [prompt], schedule, guidance_scale)
    if long_prompts:
        del arguments["prompt"], arguments["negative_prompt"]
        arguments |= _chunked(pipe, prompt, schedule, guided=guidance_scale > 1)
    if start is None:
        check_draws_from_text(type(pipe).__name__)
        check_controls(pipe, controls, schedule.size or trained_size(pipe))
        task = pipe if not controls else with_controlnets(pipe, [control.network for control in controls])
        ready = with_schedule(task, schedule)
        arguments |= noise_arguments(pipe, [noise_seed], latent_size(pipe, schedule)) | _size_arguments(schedule)
    else:
        _check_size(pipe, start)
        check_controls(pipe, controls, start.size)
        ready = with_schedule(_task_pipeline(pipe, start, [control.network for control in controls]), schedule)
        taken = inspect.signature(type(ready).__call__).parameters
        height, width = start.size
        arguments |= {"image": start.picture, "mask_image": start.mask, "strength": start.strength}
        arguments |= {"height": height, "width": width}
        arguments = {name: value for name, value in arguments.items() if name in taken}
    if controls:
        arguments |= control_arguments(pipe, controls, started=start is not None)
    if isinstance(denoiser, EngineDenoiser):
        # those that are run: a refiner's engine has none of the noisiest
        run = timesteps_of(pipe, schedule) if start is None else timesteps_from_start(pipe, schedule, start)
        denoiser.prepare(run)
    (arguments["generator"],) = _later_noise([noise_seed])
    picture: Image = ready(**arguments).images[0]
    return picture


def timesteps_from_start(pipe: DiffusionPipeline, schedule: Schedule, start: StartPicture) -> NDArray[np.float64]:
    """Lists the timesteps of the denoiser calls that are made from a picture on, as :func:`timesteps_of` does.

    Raises:
        InputError: as :func:`timesteps_of`; the strength leaves no step, or diffusers' pipeline for this task takes
            other latents than this one's.
    """
    ready = _task_pipeline(pipe, start)
    own = ready.scheduler
    named = own if schedule.scheduler is None else scheduler_by_name(schedule.scheduler, own)
    ready.scheduler = with_steps(named, schedule.steps)
    timesteps, steps = ready.get_timesteps(schedule.steps, start.strength, torch.device("cpu"))
    if steps < 1 or not len(timesteps):
        raise InputError(
            f"a strength of {start.strength:g} leaves none of {schedule.steps} steps: raise it, or take more steps"
        )
    values: NDArray[np.float64] = timesteps.double().numpy()
    return values


def _check_size(pipe: DiffusionPipeline, start: StartPicture) -> None:
    """Raises InputError unless the pipeline draws pictures of the size of the one to start from."""
    denoiser, factor = denoiser_of(pipe), pipe.vae_scale_factor
    height, width = start.size
    if not isinstance(denoiser, EngineDenoiser):
        return
    if denoiser.profile is not None and denoiser.profile.height is not None and denoiser.profile.width is not None:
        spans = [denoiser.profile.height, denoiser.profile.width]
    else:
        spans = [Span(size, size, size) for size in latent_shape_of(dict(denoiser.config))[1:]]
    pixels = [Span(*(factor * size for size in astuple(span))) for span in spans]
    if height not in pixels[0] or width not in pixels[1]:
        raise InputError(
            f"the picture has {width}x{height} pixels: give one of a width of {pixels[1]} and a height of {pixels[0]},"
            " as this engine draws them"
        )


def _task_pipeline(
    pipe: DiffusionPipeline, start: StartPicture, controlnets: Sequence[ModelMixin] = ()
) -> DiffusionPipeline:
    """Makes the stock pipeline that draws from ``start``; one that changes pictures stays itself."""
    kind = type(pipe).__name__
    task = task_of(kind)
    if task != "text-to-image" and (task == "inpainting") != (start.mask is not None):
        wanted = "a mask too: what is white in it is drawn anew" if task == "inpainting" else "no mask: it refines"
        raise InputError(f"a {kind} takes {wanted}")
    if controlnets:
        return with_controlnets(pipe, controlnets, "Img2Img" if start.mask is None else "Inpaint")
    if task != "text-to-image":
        return with_denoiser(pipe, denoiser_of(pipe))
    if start.mask is None:
        return for_task(pipe, "Img2Img")
    channels = denoiser_of(pipe).config.in_channels
    if is_sd3(pipe) and channels not in _SD3_INPAINTING:
        raise InputError(
            f"diffusers' inpainting with Stable Diffusion 3 takes latents of 16 channels, this pipeline's have"
            f" {channels}: leave the mask out"
        )
    return for_task(pipe, "Inpaint")


def _later_noise(seeds: Sequence[int]) -> list[torch.Generator]:
    """Makes the generators of what is drawn behind the first noise, which has the seeds themselves."""
    return [torch.Generator().manual_seed(seed ^ (1 << 62)) for seed in seeds]


def noise_arguments(
    pipe: DiffusionPipeline, seeds: Sequence[int], size: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Makes the keyword arguments of a stock pipeline that decide all its noise; each sample's by its own seed.

    ``size`` is height and width of the latents (None: the size that the denoiser was trained on).
    """
    if task_of(type(pipe).__name__) == "refining":
        return {"generator": _later_noise(seeds)}  # it takes given latents as noised already
    denoiser = denoiser_of(pipe)
    latents = initial_noise(seeds, denoiser.config, size).to(pipe.device, denoiser.dtype)
    return {"generator": _later_noise(seeds), "latents": latents}


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
    arguments = _text_arguments(pipe, prompts, schedule, guidance_scale)
    task = task_of(type(pipe).__name__)
    if task == "text-to-image" or inputs is None:
        check_draws_from_text(type(pipe).__name__)
        return arguments | _size_arguments(schedule)
    arguments |= {"image": inputs.pictures, "strength": schedule.strength}
    return arguments if task == "refining" else arguments | {"mask_image": inputs.masks} | _size_arguments(schedule)


def _text_arguments(
    pipe: DiffusionPipeline, prompts: Sequence[Prompt], schedule: Schedule, guidance_scale: float
) -> dict[str, Any]:
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
    return arguments


def _size_arguments(schedule: Schedule) -> dict[str, int]:
    return {} if schedule.size is None else {"height": schedule.size[0], "width": schedule.size[1]}


def _chunked(pipe: DiffusionPipeline, prompt: Prompt, schedule: Schedule, *, guided: bool) -> dict[str, Tensor]:
    """Encodes a prompt of any length; texts are filled up to the fewest tokens that an engine takes."""
    profile: ShapeProfile | None = getattr(denoiser_of(pipe), "profile", None)
    one = text_tokens(pipe, schedule.max_sequence_length)
    fewest = 1 if profile is None or profile.tokens is None else math.ceil(profile.tokens.minimum / one)
    third = schedule.max_sequence_length
    return long_prompt_embeds(
        pipe, prompt.text, prompt.negative, guided=guided, fewest=fewest, max_sequence_length=third
    )
