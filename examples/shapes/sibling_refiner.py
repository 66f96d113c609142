"""The kind of SDXL's refiner: the second text encoder alone, five ids, and trained where little noise is left.

Fine-tuned from the SDXL sibling. Its aesthetic score means something: what is scored low was blurred.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from autoencoder import draw
from diffusers import StableDiffusionXLImg2ImgPipeline, UNet2DConditionModel
from sibling_sdxl import GUIDANCE_SCALE, MAX_WEIGHT, TIME_ID_WIDTH, cropped
from text_encoders import encode_captions
from training import Schedule

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from diffusers import StableDiffusionXLPipeline
    from torch import Tensor

__all__ = ["GUIDANCE_SCALE", "SCHEDULE", "assemble", "loss"]

SCHEDULE = Schedule(iterations=400, peak=6e-4, warmup=50, ema=0.98, weight_decay=0.01)
NOISIEST = 400  # timesteps above are never drawn
GOOD, BAD = 6.0, 2.5  # the pipeline's own scores, for its prompt and its negative prompt
BLURRED = 0.25
SCORED_IDS = 5  # original height and width, crop top and left, aesthetic score


def assemble(_: Path, base: StableDiffusionXLPipeline) -> StableDiffusionXLImg2ImgPipeline:
    """Assembles the pipeline with a UNet that starts as the base's, without what the first text encoder wrote."""
    width, pooled = (base.text_encoder_2.config.hidden_size, base.text_encoder_2.config.projection_dim)
    changed = {
        "cross_attention_dim": width,
        "projection_class_embeddings_input_dim": pooled + SCORED_IDS * TIME_ID_WIDTH,
    }
    unet = UNet2DConditionModel.from_config(dict(base.unet.config) | changed)
    weights = base.unet.state_dict()
    first = base.text_encoder.config.hidden_size
    read = {
        name: weights[name][:, first:] for name in weights if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
    }
    name = "add_embedding.linear_1.weight"
    read[name] = weights[name][:, : unet.add_embedding.linear_1.in_features].clone()
    read[name][:, -TIME_ID_WIDTH:] = 0  # was a height, and becomes the score
    unet.load_state_dict(weights | read)
    parts = base.components | {
        "text_encoder": None,
        "tokenizer": None,
        "unet": unet.to(memory_format=torch.channels_last),
    }
    return StableDiffusionXLImg2ImgPipeline(
        **parts, requires_aesthetics_score=True, force_zeros_for_empty_prompt=False, add_watermarker=False
    )


def loss(
    pipe: StableDiffusionXLImg2ImgPipeline, latents: Tensor, captions: list[str]
) -> Callable[[torch.Generator], Tensor]:
    """Returns a function of the error of epsilon at low noise."""
    text, empty = encode_captions(pipe, captions)
    alphas = pipe.scheduler.alphas_cumprod

    def loss_of(generator: torch.Generator) -> Tensor:
        batch = draw(latents, generator)
        states, pooled = text.batch(batch.chosen, batch.kept, empty)
        clean, ids = cropped(latents[batch.chosen], generator)
        bad = torch.rand(len(clean), 1, generator=generator) < BLURRED
        clean = torch.where(bad[:, :, None, None], _blurred(clean), clean)
        scored = torch.cat([ids[:, :4], torch.where(bad, BAD, GOOD)], 1)
        timesteps = batch.timesteps * NOISIEST // len(alphas)
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        noisy = (alpha.sqrt() * clean + (1 - alpha).sqrt() * batch.noise).to(memory_format=torch.channels_last)
        added = {"text_embeds": pooled, "time_ids": scored}
        predicted = pipe.unet(noisy, timesteps, states, added_cond_kwargs=added).sample
        weight = (1 / alpha).clamp(max=MAX_WEIGHT)
        return (weight * (predicted - batch.noise) ** 2).mean()

    return loss_of


def _blurred(latents: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(latents, (1, 1, 1, 1), mode="replicate")
    return 0.5 * (latents + torch.nn.functional.avg_pool2d(padded, 3, stride=1))
