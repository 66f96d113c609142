"""The autoencoder of the bundled pipelines, 64x64 pictures to 8x8x4 latents, and the latents that denoisers train on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from scenes import to_unit, training_captions, training_scenes
from training import Schedule, train

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

SCENES = 60_000
BATCH, DENOISER_BATCH = 32, 64
DROPPED_CAPTIONS = 0.1
# Stable Diffusion's noise schedule, of all its kinds up to SDXL
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SCHEDULE = Schedule(iterations=2_800, peak=2e-3, warmup=100, ema=0.998)
REFINEMENT = Schedule(iterations=1_300, peak=6e-4, warmup=50, ema=0.998, seed=1)
OBJECT_WEIGHT = 6.0  # in the refinement: objects cover a tenth of a picture, and small ones lost their corners
KL_WEIGHT = 3e-5


def new_vae() -> AutoencoderKL:
    """Makes an untrained autoencoder (seeded by the caller)."""
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
    """Encodes uint8 pictures [n, 3, 64, 64] to mean latents, unscaled: float32 [n, 4, 8, 8]."""
    parts = [vae.encode(to_unit(part)).latent_dist.mean for part in pictures.split(batch)]
    return torch.cat(parts).contiguous()


@dataclass(frozen=True)
class Draw:
    """A training batch: indices int64 [64], kept captions bool [64], timesteps int64 [64], noise [64, 4, 8, 8]."""

    chosen: Tensor
    kept: Tensor
    timesteps: Tensor
    noise: Tensor


def draw(latents: Tensor, generator: torch.Generator) -> Draw:
    """Draws one training batch."""
    return Draw(
        chosen=torch.randint(len(latents), (DENOISER_BATCH,), generator=generator),
        kept=torch.rand(DENOISER_BATCH, 1, 1, generator=generator).flatten() >= DROPPED_CAPTIONS,
        timesteps=torch.randint(1000, (DENOISER_BATCH,), generator=generator),
        noise=torch.randn(latents[:DENOISER_BATCH].shape, generator=generator),
    )


def scaled_latents(vae: AutoencoderKL, folder: Path) -> tuple[Tensor, list[str]]:
    """Returns latents float32 [n, 4, 8, 8] of unit variance with captions; encoded once, then read from ``folder``."""
    cache = folder / "latents.safetensors"
    if not cache.exists():
        pictures, _ = training_scenes(SCENES)
        save_file({"latents": encode(vae, pictures) * vae.config.scaling_factor}, cache)
    return load_file(cache)["latents"], training_captions(SCENES)
