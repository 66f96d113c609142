"""A Stable Diffusion pipeline in diffusers format whose UNet runs in a millisecond: bundled text encoder and VAE."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import torch
from diffusers import UNet2DConditionModel

from s2p_deploy.families import BasePipeline, resolve_base

if TYPE_CHECKING:
    from pathlib import Path


def tiny_base(folder: Path) -> BasePipeline:
    """Writes it to ``folder``: random UNet weights of 8 and 16 channels, 8x8x4 latents."""
    shutil.copytree(resolve_base("shapes").folder, folder, ignore=shutil.ignore_patterns("unet", "classifier*"))
    tiny_unet(cross_attention_dim=128).save_pretrained(folder / "unet")
    return resolve_base(str(folder))


def tiny_unet(cross_attention_dim: int) -> UNet2DConditionModel:
    """A UNet of the SD1 kind with random weights from a fixed seed, 8 and 16 channels."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=2,
        norm_num_groups=4,
    )
