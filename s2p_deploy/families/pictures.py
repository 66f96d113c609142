"""Pictures that a pipeline changes: their latents, synthetic masks, and what an inpainting network reads of both."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from s2p_deploy.errors import InputError
from s2p_deploy.families.pipelines import load_pipeline, resolve_base

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffusers import DiffusionPipeline
    from torch import Tensor

    from s2p_deploy.records import PromptSet

_AT_ONCE = 8  # pictures in one call of an autoencoder, which takes gigabytes at full size
_WHOLE = 0.125  # share of the synthetic masks that cover all of a picture
_MASKED = 0.5  # above it a mask covers, as diffusers' pipelines have it


@dataclass(frozen=True)
class PictureInputs:
    """Pictures float32 [n, 3, H, W] in [0, 1], and masks [n, 1, H, W] that are 1 where they are drawn anew."""

    pictures: Tensor
    masks: Tensor

    def __getitem__(self, some: slice) -> PictureInputs:
        """Selects some."""
        return PictureInputs(self.pictures[some], self.masks[some])

    @staticmethod
    def masked(pictures: Tensor, seeds: Sequence[int]) -> PictureInputs:
        """Lays a synthetic mask over each picture; a mask depends on its own seed alone."""
        height, width = pictures.shape[2:]
        return PictureInputs(pictures, torch.stack([synthetic_mask(seed, height, width) for seed in seeds]))

    @staticmethod
    def whole(count: int, height: int, width: int) -> PictureInputs:
        """Makes grey pictures that are all masked: what is drawn does not depend on them."""
        return PictureInputs(torch.full((count, 3, height, width), 0.5), torch.ones(count, 1, height, width))


def synthetic_mask(seed: int, height: int, width: int) -> Tensor:
    """Draws a mask float32 [1, height, width]: 1 in a rectangle of a quarter to three quarters of each side, 0 around.

    One in eight covers everything.
    """
    draws = random.Random(seed)
    mask = torch.zeros(1, height, width)
    if draws.random() < _WHOLE:
        return mask + 1
    (top, rows), (left, columns) = (_span(draws, side) for side in (height, width))
    mask[:, top : top + rows, left : left + columns] = 1
    return mask


def _span(draws: random.Random, side: int) -> tuple[int, int]:
    length = max(1, round(side * draws.uniform(0.25, 0.75)))
    return draws.randint(0, side - length), length


def pictures_of(model: str, prompts: PromptSet, steps: int, size: tuple[int, int], device: torch.device) -> Tensor:
    """Draws a picture float32 [n, 3, H, W] in [0, 1] of every prompt with a text-to-image pipeline, on a device.

    Args:
        model: a folder, a hub id or the bundled one; it draws with its own scheduler and guidance.
        prompts: texts and seeds.
        steps: number of denoising steps.
        size: height and width in pixels that are wanted.
        device: where to draw.

    Raises:
        InputError: there is no such pipeline, or it draws no pictures of this size from text.
    """
    base = resolve_base(model)
    if base.task != "text-to-image":
        raise InputError(f"sampling.pictures: {model} is a {base.pipeline_class}: name a text-to-image pipeline")
    pipe = load_pipeline(base).to(device)
    drawn = []
    for start in range(0, len(prompts.prompts), _AT_ONCE):
        some = prompts.prompts[start : start + _AT_ONCE]
        negatives = [prompt.negative for prompt in some]
        result = pipe(
            [prompt.text for prompt in some],
            negative_prompt=negatives if any(negatives) else None,
            num_inference_steps=steps,
            guidance_scale=base.default_guidance,
            generator=[torch.Generator().manual_seed(prompt.noise_seed) for prompt in some],
            output_type="pt",
        )
        drawn.append(result.images.float().cpu())
    pictures = torch.cat(drawn)
    found = (pictures.shape[2], pictures.shape[3])
    if found != size:
        raise InputError(
            f"sampling.pictures: {model} draws {found[0]}x{found[1]} pixels, {size[0]}x{size[1]} are wanted"
        )
    return pictures


@torch.no_grad()
def picture_latents(pipe: DiffusionPipeline, pictures: Tensor) -> Tensor:
    """Encodes pictures [n, 3, H, W] in [0, 1] to scaled latents float32 [n, C, h, w], their distributions' means."""
    return _encoded(pipe, 2 * pictures - 1)


@torch.no_grad()
def latent_pictures(pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
    """Decodes scaled latents [n, C, h, w] to pictures float32 [n, 3, H, W] in [0, 1]."""
    config, place = pipe.vae.config, {"device": pipe.vae.device, "dtype": pipe.vae.dtype}
    mean, std = (config.get(name) for name in ("latents_mean", "latents_std"))  # SDXL's of some fine-tunes
    if mean is None or std is None:
        plain = latents / config.scaling_factor + (config.get("shift_factor") or 0.0)
    else:
        mean, std = (torch.tensor(values).view(1, -1, 1, 1).to(latents) for values in (mean, std))
        plain = latents * std / config.scaling_factor + mean
    parts = [pipe.vae.decode(part.to(**place), return_dict=False)[0].float().cpu() for part in plain.split(_AT_ONCE)]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def mask_channels(pipe: DiffusionPipeline, inputs: PictureInputs) -> Tensor:
    """Computes masks and latents of the masked pictures float32 [n, 1 + C, h, w], as inpainting networks read them."""
    latents = _encoded(pipe, (2 * inputs.pictures - 1) * (inputs.masks < _MASKED))
    return torch.cat([torch.nn.functional.interpolate(inputs.masks, latents.shape[2:]), latents], 1)


def _encoded(pipe: DiffusionPipeline, planes: Tensor) -> Tensor:
    """Encodes pictures in [-1, 1]."""
    config, place = pipe.vae.config, {"device": pipe.vae.device, "dtype": pipe.vae.dtype}
    parts = [pipe.vae.encode(part.to(**place)).latent_dist.mean.float().cpu() for part in planes.split(_AT_ONCE)]
    latents: Tensor = (torch.cat(parts) - (config.get("shift_factor") or 0.0)) * config.scaling_factor
    return latents
