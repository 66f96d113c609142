"""What adapters of a finished pipeline are trained on: scenes, their noisy latents, and the error of epsilon.

For UNets of the SD1 and SDXL kind, as they are: an adapter's loss goes through the frozen UNet.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from autoencoder import DROPPED_CAPTIONS, encode
from text_encoders import encode_captions
from train_unet import MAX_WEIGHT

from s2p_deploy.families import load_pipeline, resolve_base
from s2p_deploy.shapes.scenes import caption, render, sample_scene

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers import DiffusionPipeline
    from torch import Tensor

    from s2p_deploy.shapes.scenes import Scene

    # indices int64 [n] and kept captions bool [n] to keyword arguments of a UNet
    Captions = Callable[[Tensor, Tensor], dict[str, Any]]

ASSETS = Path(__file__).parents[2] / "tests" / "assets"
BASES = {"sd1": "shapes", "sdxl": str(ASSETS / "pipelines" / "shapes-sdxl")}
SCENES, BATCH = 3_000, 32
SEED = 20
TIME_IDS = (64, 64, 0, 0, 64, 64)  # SDXL's size ids of a whole picture


def frozen_pipeline(kind: str) -> DiffusionPipeline:
    """Loads a pipeline of :data:`BASES` for the training of an adapter: no weight of its own has gradients."""
    pipe = load_pipeline(resolve_base(BASES[kind]))
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(requires_grad=False)
    pipe.unet.to(memory_format=torch.channels_last)
    return pipe


@dataclass(frozen=True)
class Examples:
    """Scenes with pictures uint8 [n, 3, 64, 64] and their scaled latents float32 [n, 4, 8, 8]."""

    scenes: list[Scene]
    pictures: Tensor
    latents: Tensor


def examples(pipe: DiffusionPipeline, change: Callable[[Scene], Scene] | None = None, count: int = SCENES) -> Examples:
    """Draws training scenes and renders them, each as ``change`` makes it."""
    rng = np.random.default_rng(SEED)
    scenes = [sample_scene(rng, held_out=False) for _ in range(count)]
    shown = scenes if change is None else [change(scene) for scene in scenes]
    pictures = torch.from_numpy(np.stack([render(scene, rng) for scene in shown])).permute(0, 3, 1, 2).contiguous()
    return Examples(scenes, pictures, encode(pipe.vae, pictures) * pipe.vae.config.scaling_factor)


def encoded_captions(pipe: DiffusionPipeline, scenes: list[Scene]) -> Captions:
    """Encodes the captions of scenes once, and returns a function that gives a UNet those that are asked for."""
    text, empty = encode_captions(pipe, [caption(scene) for scene in scenes])

    def given(chosen: Tensor, kept: Tensor) -> dict[str, Any]:
        states, pooled = text.batch(chosen, kept, empty)
        if pooled is None:
            return {"encoder_hidden_states": states}
        ids = torch.tensor([TIME_IDS] * len(chosen)).float()
        return {"encoder_hidden_states": states, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}

    return given


@torch.no_grad()
def text_arguments(pipe: DiffusionPipeline, texts: list[str]) -> dict[str, Any]:
    """Makes a pipeline's keyword arguments for texts; where they are empty, what training has for no caption.

    That is what guidance takes for none, zeros in SDXL, whose encoders were never asked for an empty text.
    """
    if any(texts):
        return {"prompt": texts}
    states = pipe.encode_prompt(prompt=texts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return {name: states[place | 1] for place, name in enumerate(names[: len(states)])}


@dataclass(frozen=True)
class Batch:
    """Noisy latents ``sample`` of the ``chosen`` scenes, the ``noise`` in them, and which captions are kept."""

    chosen: Tensor
    timesteps: Tensor
    noise: Tensor
    sample: Tensor
    alpha: Tensor
    kept: Tensor

    def error(self, predicted: Tensor) -> Tensor:
        """Computes the error of epsilon, weighted as in the UNet's own training."""
        return ((1 / self.alpha).clamp(max=MAX_WEIGHT) * (predicted - self.noise) ** 2).mean()


def draw_batch(
    latents: Tensor,
    alphas: Tensor,
    generator: torch.Generator,
    dropped: float = DROPPED_CAPTIONS,
    least_timestep: int = 0,
) -> Batch:
    """Draws a training batch; ``alphas`` are the scheduler's cumulative products."""
    chosen = torch.randint(len(latents), (BATCH,), generator=generator)
    timesteps = torch.randint(least_timestep, 1000, (BATCH,), generator=generator)
    noise = torch.randn(latents[chosen].shape, generator=generator)
    kept = torch.rand(BATCH, generator=generator) >= dropped
    alpha = alphas[timesteps].view(-1, 1, 1, 1)
    sample = alpha.sqrt() * latents[chosen] + (1 - alpha).sqrt() * noise
    return Batch(chosen, timesteps, noise, sample.to(memory_format=torch.channels_last), alpha, kept)
