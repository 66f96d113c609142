"""Pictures that trajectories start from where a pipeline changes some: inpainting its own, a refiner its base's."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from s2p_deploy.calib.trajectories import final_latents, trajectory_inputs
from s2p_deploy.errors import InputError
from s2p_deploy.families import latent_shape
from s2p_deploy.families.pictures import PictureInputs, latent_pictures, mask_channels, picture_latents, pictures_of
from s2p_deploy.families.pipelines import resolve_base, task_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diffusers import DiffusionPipeline
    from torch import Tensor

    from s2p_deploy.calib.trajectories import Denoise, FloatPipeline
    from s2p_deploy.recipe import Recipe
    from s2p_deploy.records import PromptSet

MASKED = 64  # own pictures under the masks of all prompts, each of which has a mask of its own


def changed_pictures(source: FloatPipeline, denoise: Denoise, prompts: PromptSet, recipe: Recipe) -> dict[str, Tensor]:
    """Makes what the trajectories of a (resolved) recipe start from besides noise.

    ``mask`` float32 [n, 1 + C, H, W] is what an inpainting network reads behind its latents; ``clean`` float32
    [n, C, H, W] are latents of the pictures that a refiner noises and refines. One of them is there, or none where a
    pipeline draws from text alone.

    Args:
        source: the pipeline.
        denoise: its denoiser.
        prompts: whose trajectories are walked; noise and masks come from their seeds.
        recipe: ``sampling.pictures`` names the pipeline that draws the pictures.

    Raises:
        InputError: that pipeline is missing, or draws no pictures of this size from text.
    """
    check_pictures(type(source.pipe).__name__, recipe)
    task = task_of(type(source.pipe).__name__)
    if task == "text-to-image":
        return {}
    few = prompts if task == "refining" else prompts.first(MASKED)
    with autoencoder_on(source.pipe, source.device):
        if recipe.sampling.pictures is None:
            pictures = _own_pictures(source, denoise, few, recipe)
        else:
            size = _picture_size(source)
            pictures = pictures_of(recipe.sampling.pictures, few, recipe.sampling.steps, size, source.device)
        if task == "refining":
            return {"clean": picture_latents(source.pipe, pictures)}
        seeds = [prompt.noise_seed for prompt in prompts.prompts]
        repeated = pictures[torch.arange(len(seeds)) % len(pictures)]
        return {"mask": mask_channels(source.pipe, PictureInputs.masked(repeated, seeds))}


def check_pictures(pipeline_class: str, recipe: Recipe) -> None:
    """Checks that a recipe says what a pipeline of that class changes, and only that.

    Raises:
        InputError: a refiner has no pictures, or a pipeline that draws from text alone is given some.
    """
    task, pictures = task_of(pipeline_class), recipe.sampling.pictures
    if task == "refining" and pictures is None:
        raise InputError(
            "a refiner changes another pipeline's pictures: name its base model (a folder or hub id),"
            " --set sampling.pictures=MODEL"
        )
    if task == "text-to-image" and pictures is not None:
        raise InputError(f"a {pipeline_class} draws from text alone: leave sampling.pictures out")
    if task != "refining" and recipe.sampling.strength not in {None, 1.0}:
        raise InputError(
            f"a {pipeline_class} is calibrated from noise, on whole schedules: leave sampling.strength out"
        )


def drawn_by(recipe: Recipe) -> dict[str, str]:
    """Names the pipeline that draws the pictures to change, where the recipe has one: by its digest.

    Raises:
        InputError: there is no such pipeline.
    """
    name = recipe.sampling.pictures
    return {} if name is None else {"pictures' pipeline": resolve_base(name).base.digest}


def _own_pictures(source: FloatPipeline, denoise: Denoise, prompts: PromptSet, recipe: Recipe) -> Tensor:
    """Draws pictures float32 [n, 3, H, W] of an inpainting pipeline with everything masked."""
    height, width = _picture_size(source)
    whole = mask_channels(source.pipe, PictureInputs.whole(1, height, width)).expand(len(prompts.prompts), -1, -1, -1)
    inputs = trajectory_inputs(source, prompts, recipe, mask=whole)
    return latent_pictures(source.pipe, final_latents(denoise, inputs))


def _picture_size(source: FloatPipeline) -> tuple[int, int]:
    _, height, width = latent_shape(source.denoiser)
    factor = source.pipe.vae_scale_factor
    return height * factor, width * factor


@contextmanager
def autoencoder_on(pipe: DiffusionPipeline, device: torch.device) -> Iterator[None]:
    """Keeps a pipeline's autoencoder on ``device`` while the context lasts."""
    before = pipe.vae.device
    try:
        pipe.vae.to(device)
        yield
    finally:
        pipe.vae.to(before)
