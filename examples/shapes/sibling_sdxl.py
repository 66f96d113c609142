"""The SDXL kind: two text encoders, pooled text and size ids beside the timestep, transformers of several layers.

Its size ids mean something: one picture in five is a crop of a larger one, moved by one latent (8 pixels), and says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from autoencoder import BETAS, draw
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from text_encoders import encode_captions, train_second_encoder
from training import Schedule

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from diffusers import StableDiffusionPipeline
    from torch import Tensor

SCHEDULE = Schedule(iterations=3_500, peak=1e-3, warmup=200, ema=0.999, weight_decay=0.01)
GUIDANCE_SCALE = 2.0
MAX_WEIGHT = 60.0  # of the epsilon error; see train_unet.py
CROPPED = 0.25  # a quarter of them by nothing
PIXELS_PER_LATENT = 8
TIME_ID_WIDTH, TIME_IDS = 16, 6


def assemble(folder: Path, base: StableDiffusionPipeline) -> StableDiffusionXLPipeline:
    """Assembles the pipeline with an untrained UNet (seeded by the caller) and a trained second text encoder."""
    second = train_second_encoder(folder, base.tokenizer, base.text_encoder)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 80),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        layers_per_block=1,
        cross_attention_dim=base.text_encoder.config.hidden_size + second.config.hidden_size,
        attention_head_dim=(3, 5),  # head counts, as in SDXL's configuration
        use_linear_projection=True,
        norm_num_groups=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=second.config.projection_dim + TIME_IDS * TIME_ID_WIDTH,
    )
    scheduler = EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1)
    return StableDiffusionXLPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        text_encoder_2=second,
        tokenizer=base.tokenizer,
        tokenizer_2=base.tokenizer,
        unet=unet.to(memory_format=torch.channels_last),
        scheduler=scheduler,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def loss(pipe: StableDiffusionXLPipeline, latents: Tensor, captions: list[str]) -> Callable[[torch.Generator], Tensor]:
    """Returns a function of the error of epsilon, weighted as for SD1; a dropped caption is zeros, pooled text too."""
    text, empty = encode_captions(pipe, captions)
    alphas = pipe.scheduler.alphas_cumprod

    def loss_of(generator: torch.Generator) -> Tensor:
        batch = draw(latents, generator)
        states, pooled = text.batch(batch.chosen, batch.kept, empty)
        clean, ids = cropped(latents[batch.chosen], generator)
        alpha = alphas[batch.timesteps].view(-1, 1, 1, 1)
        noisy = (alpha.sqrt() * clean + (1 - alpha).sqrt() * batch.noise).to(memory_format=torch.channels_last)
        added = {"text_embeds": pooled, "time_ids": ids}
        predicted = pipe.unet(noisy, batch.timesteps, states, added_cond_kwargs=added).sample
        weight = (1 / alpha).clamp(max=MAX_WEIGHT)
        return (weight * (predicted - batch.noise) ** 2).mean()

    return loss_of


def cropped(latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Latents [n, 4, 8, 8], some of them moved up and left by one as a crop would, and their size ids float32 [n, 6].

    Ids are (original height, width, crop top, left, target height, width) in pixels, as the pipeline gives them.
    """
    count, size = len(latents), latents.shape[-1]
    is_crop = torch.rand(count, 1, generator=generator) < CROPPED
    moved = torch.randint(2, (count, 2), generator=generator) * is_crop
    padded = torch.nn.functional.pad(latents, (0, 1, 0, 1), mode="replicate")
    clean = torch.stack([part[:, y : y + size, x : x + size] for part, (y, x) in zip(padded, moved, strict=True)])
    target = torch.full((count, 2), size * PIXELS_PER_LATENT)
    corner = moved * PIXELS_PER_LATENT
    return clean, torch.cat([target + corner, corner, target], 1).float()
