"""The SD2 kind: linear projections around its transformers, a head count per level, v-prediction."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from autoencoder import BETAS, draw
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from text_encoders import encode_captions
from training import Schedule

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

SCHEDULE = Schedule(iterations=2_000, peak=1e-3, warmup=200, ema=0.999, weight_decay=0.01)
GUIDANCE_SCALE = 2.0


def assemble(_: Path, base: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """Assembles the pipeline with an untrained UNet (seeded by the caller)."""
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 96),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=base.text_encoder.config.hidden_size,
        attention_head_dim=(4, 6),  # head counts, as in SD2's configuration
        use_linear_projection=True,
        norm_num_groups=16,
    )
    scheduler = DDIMScheduler(
        **BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction"
    )
    return StableDiffusionPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=unet.to(memory_format=torch.channels_last),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def loss(pipe: StableDiffusionPipeline, latents: Tensor, captions: list[str]) -> Callable[[torch.Generator], Tensor]:
    """Returns a function of the unweighted error of v."""
    text, empty = encode_captions(pipe, captions)
    alphas = pipe.scheduler.alphas_cumprod

    def loss_of(generator: torch.Generator) -> Tensor:
        batch = draw(latents, generator)
        states, _ = text.batch(batch.chosen, batch.kept, empty)
        alpha = alphas[batch.timesteps].view(-1, 1, 1, 1)
        clean = latents[batch.chosen]
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * batch.noise
        velocity = alpha.sqrt() * batch.noise - (1 - alpha).sqrt() * clean
        predicted = pipe.unet(noisy.to(memory_format=torch.channels_last), batch.timesteps, states).sample
        return torch.nn.functional.mse_loss(predicted, velocity)

    return loss_of
