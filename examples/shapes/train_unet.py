"""Trains the UNet of the bundled SD1-kind pipeline on latents of rendered scenes.

Number and place of the objects are decided at high noise, where an unweighted epsilon loss hardly trains: the error is
weighted by 1/alpha^2, which makes it the v-prediction loss, limited at the noisiest end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from autoencoder import BETAS, draw, scaled_latents
from diffusers import PNDMScheduler, UNet2DConditionModel
from text_encoders import tokenize
from training import Schedule, train

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import AutoencoderKL
    from torch import Tensor
    from transformers import CLIPTextModel, CLIPTokenizer

SCHEDULE = Schedule(iterations=6_000, peak=1e-3, warmup=300, ema=0.9995, weight_decay=0.01)
MAX_WEIGHT = 60.0


def new_unet(width: int) -> UNet2DConditionModel:
    """Makes an untrained UNet of the SD1 kind: convolutional projections, GEGLU feed-forwards, eight-pixel latents."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(80, 128),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=width,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def new_scheduler() -> PNDMScheduler:
    """Makes Stable Diffusion v1's scheduler."""
    return PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)


@torch.no_grad()
def embed(tokenizer: CLIPTokenizer, encoder: CLIPTextModel, texts: list[str]) -> Tensor:
    """Encodes texts to states float16 [n, 24, width]."""
    parts = tokenize(tokenizer, texts).split(256)
    return torch.cat([encoder(part).last_hidden_state.half() for part in parts])


def train_unet(
    folder: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, encoder: CLIPTextModel
) -> UNet2DConditionModel:
    """Trains (or goes on with) the UNet; the text encoder stays as it is."""
    torch.manual_seed(0)
    unet = new_unet(encoder.config.hidden_size).train().to(memory_format=torch.channels_last)
    latents, captions = scaled_latents(vae, folder)
    text = embed(tokenizer, encoder, captions)
    empty = embed(tokenizer, encoder, [""])
    alphas = new_scheduler().alphas_cumprod

    def loss_of(generator: torch.Generator) -> Tensor:
        batch = draw(latents, generator)
        alpha = alphas[batch.timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents[batch.chosen] + (1 - alpha).sqrt() * batch.noise
        states = torch.where(batch.kept[:, None, None], text[batch.chosen], empty).float()
        predicted = unet(noisy.to(memory_format=torch.channels_last), batch.timesteps, states).sample
        weight = (1 / alpha).clamp(max=MAX_WEIGHT)
        return (weight * (predicted - batch.noise) ** 2).mean()

    unet.load_state_dict(train(unet, loss_of, SCHEDULE, folder / "unet.safetensors"))
    return unet.eval()
