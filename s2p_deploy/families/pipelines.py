"""Stock diffusers pipelines of every family, and the denoiser in them."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from diffusers import DiffusionPipeline, ModelMixin

# Stock pipelines that an engine's denoiser stands in; those besides text-to-image blend latents with a picture's.
PIPELINES = tuple(
    f"StableDiffusion{family}{task}Pipeline" for family in ("", "XL", "3") for task in ("", "Img2Img", "Inpaint")
)


def denoiser_name(pipe: DiffusionPipeline) -> str:
    """Name of the denoiser among the pipeline's components."""
    return "transformer" if "transformer" in pipe.components else "unet"


def denoiser_of(pipe: DiffusionPipeline) -> ModelMixin:
    """The pipeline's denoiser."""
    return pipe.components[denoiser_name(pipe)]


def with_denoiser(pipe: DiffusionPipeline, denoiser: torch.nn.Module) -> DiffusionPipeline:
    """A pipeline of the same class that shares all of ``pipe`` but the denoiser and the scheduler (it has a state)."""
    return with_components(pipe, {denoiser_name(pipe): denoiser})


def with_components(pipe: DiffusionPipeline, others: Mapping[str, torch.nn.Module | None]) -> DiffusionPipeline:
    """A pipeline of the same class that shares all of ``pipe`` but ``others`` and the scheduler (it has a state)."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    components = pipe.components | {"scheduler": scheduler} | others
    known = set(inspect.signature(type(pipe).__init__).parameters) & set(pipe.config) - set(components)
    result = type(pipe)(**components, **{name: pipe.config[name] for name in known})
    result.set_progress_bar_config(disable=True)
    return result
