"""Trains the autoencoder of the bundled pipelines: 64x64 pictures to 8x8x4 latents."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKL
from scenes import to_unit, training_scenes
from training import Schedule, train

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

SCENES, BATCH = 60_000, 32
SCHEDULE = Schedule(iterations=2_800, peak=2e-3, warmup=100, ema=0.998)
REFINEMENT = Schedule(iterations=1_300, peak=6e-4, warmup=50, ema=0.998, seed=1)
OBJECT_WEIGHT = 6.0  # in the refinement: objects cover a tenth of a picture, and small ones lost their corners
KL_WEIGHT = 3e-5


def new_vae() -> AutoencoderKL:
    """An untrained autoencoder (seeded by the caller)."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    )


def train_vae(folder: Path) -> AutoencoderKL:
    """Trains (or goes on with) the autoencoder, and sets its scaling factor so that latents have unit variance."""
    torch.manual_seed(0)
    vae = new_vae().train()
    pictures, _ = training_scenes(SCENES)

    def loss_of(generator: torch.Generator, object_weight: float) -> Tensor:
        chosen = torch.randint(len(pictures), (BATCH,), generator=generator)
        images = to_unit(pictures[chosen])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            posterior = vae.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        is_object = (images != images[:, :, :1, :1]).any(1, keepdim=True)  # the corner pixel is always background
        weight = 1 + (object_weight - 1) * is_object
        error = decoded.float() - images
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var - 1 - posterior.logvar).mean()
        return (weight * (error.abs() + error.square())).mean() + KL_WEIGHT * kl

    vae.load_state_dict(train(vae, lambda g: loss_of(g, 1.0), SCHEDULE, folder / "vae.safetensors"))
    vae.load_state_dict(train(vae, lambda g: loss_of(g, OBJECT_WEIGHT), REFINEMENT, folder / "vae_refined.safetensors"))
    vae.eval()
    vae.register_to_config(scaling_factor=1.0 / encode(vae, pictures[:2048]).std().item())
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor, batch: int = 256) -> Tensor:
    """Mean latents, unscaled: float32 [n, 4, 8, 8] of uint8 pictures [n, 3, 64, 64]."""
    parts = [vae.encode(to_unit(part)).latent_dist.mean for part in pictures.split(batch)]
    return torch.cat(parts).contiguous()
