"""The inpainting kind: the bundled UNet, which reads a mask and the latents of the masked picture too.

Fine-tuned: it begins without looking at the further channels, whose weights are zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from autoencoder import draw, encode
from diffusers import StableDiffusionInpaintPipeline, UNet2DConditionModel
from scenes import training_scenes
from text_encoders import encode_captions
from train_unet import MAX_WEIGHT
from training import Schedule

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from torch import Tensor

SCHEDULE = Schedule(iterations=400, peak=6e-4, warmup=50, ema=0.98, weight_decay=0.01)
GUIDANCE_SCALE = 2.0
SCENES = 6_000
WHOLE = 0.15  # share of the masks that cover everything
GREY = 127.5  # what a pipeline puts under the mask


def assemble(_: Path, base: StableDiffusionPipeline) -> StableDiffusionInpaintPipeline:
    """Assembles the pipeline with a UNet that starts as the base's."""
    unet = UNet2DConditionModel.from_config(dict(base.unet.config) | {"in_channels": 9})
    weights = base.unet.state_dict()
    first = torch.zeros_like(unet.conv_in.weight)
    first[:, :4] = weights["conv_in.weight"]
    unet.load_state_dict(weights | {"conv_in.weight": first})
    parts = base.components | {"unet": unet.to(memory_format=torch.channels_last)}
    return StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)


def loss(
    pipe: StableDiffusionInpaintPipeline, _latents: Tensor, _captions: list[str]
) -> Callable[[torch.Generator], Tensor]:
    """Returns a function of the error of epsilon, weighted as the bundled UNet's; its pictures are its own."""
    pictures, captions = training_scenes(SCENES, seed=3)
    latents = encode(pipe.vae, pictures) * pipe.vae.config.scaling_factor
    conditions = masked_conditions(pipe.vae, pictures)
    text, empty = encode_captions(pipe, captions)
    alphas = pipe.scheduler.alphas_cumprod

    def loss_of(generator: torch.Generator) -> Tensor:
        batch = draw(latents, generator)
        states, _ = text.batch(batch.chosen, batch.kept, empty)
        alpha = alphas[batch.timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents[batch.chosen] + (1 - alpha).sqrt() * batch.noise
        sample = torch.cat([noisy, conditions[batch.chosen]], 1).to(memory_format=torch.channels_last)
        predicted = pipe.unet(sample, batch.timesteps, states).sample
        weight = (1 / alpha).clamp(max=MAX_WEIGHT)
        return (weight * (predicted - batch.noise) ** 2).mean()

    return loss_of


def masked_conditions(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Masks a rectangle of each picture; returns masks and masked latents, float32 [n, 1 + 4, 8, 8]."""
    generator = torch.Generator().manual_seed(3)
    count, _, height, width = pictures.shape
    first, second = (torch.randint(side + 1, (2, count), generator=generator) for side in (height, width))
    whole = torch.rand(count, generator=generator) < WHOLE
    rows, columns = (
        (torch.arange(side) >= ends.amin(0)[:, None]) & (torch.arange(side) < ends.amax(0)[:, None])
        for side, ends in ((height, first), (width, second))
    )
    mask = ((rows[:, :, None] & columns[:, None]) | whole[:, None, None]).float().unsqueeze(1)
    masked = pictures * (1 - mask) + GREY * mask
    latents = encode(vae, masked) * vae.config.scaling_factor
    return torch.cat([torch.nn.functional.interpolate(mask, latents.shape[2:]), latents], 1)
