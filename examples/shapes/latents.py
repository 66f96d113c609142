"""Latents of the training scenes, encoded once, and the noise that the SD1, SD2 and SDXL kinds are trained under."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from scenes import training_captions, training_scenes
from train_vae import encode

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import AutoencoderKL
    from torch import Tensor

SCENES, BATCH = 60_000, 64
DROPPED_CAPTIONS = 0.1
# Stable Diffusion's noise schedule, of all its kinds up to SDXL
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


@dataclass(frozen=True)
class Draw:
    """One batch: indices int64 [64], which captions are kept bool [64], timesteps int64 [64], noise [64, 4, 8, 8]."""

    chosen: Tensor
    kept: Tensor
    timesteps: Tensor
    noise: Tensor


def draw(latents: Tensor, generator: torch.Generator) -> Draw:
    """Draws one training batch."""
    return Draw(
        chosen=torch.randint(len(latents), (BATCH,), generator=generator),
        kept=torch.rand(BATCH, 1, 1, generator=generator).flatten() >= DROPPED_CAPTIONS,
        timesteps=torch.randint(1000, (BATCH,), generator=generator),
        noise=torch.randn(latents[:BATCH].shape, generator=generator),
    )


def scaled_latents(vae: AutoencoderKL, folder: Path) -> tuple[Tensor, list[str]]:
    """Latents float32 [n, 4, 8, 8] of unit variance with their captions; encoded once, then read from ``folder``."""
    cache = folder / "latents.safetensors"
    if not cache.exists():
        pictures, _ = training_scenes(SCENES)
        save_file({"latents": encode(vae, pictures) * vae.config.scaling_factor}, cache)
    return load_file(cache)["latents"], training_captions(SCENES)
