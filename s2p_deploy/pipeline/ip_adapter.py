"""Image prompts of a drawing: IP-Adapters with their image encoders, each with the picture that it reads."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.embeddings import ImageProjection
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from s2p_deploy.errors import InputError
from s2p_deploy.families import denoiser_of
from s2p_deploy.families.ip_adapter import read_ip_adapter
from s2p_deploy.families.network_files import load_network
from s2p_deploy.pipeline.components import EngineUNet
from s2p_deploy.pipeline.image_prompts import IpAdapters, packed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffusers import DiffusionPipeline
    from PIL.Image import Image
    from torch import Tensor

    from s2p_deploy.records.optional_inputs import ImageSlots

ENCODER = "image_encoder"  # folder beside an IP-Adapter's file
MOST_SCALE = 10.0


@dataclass(frozen=True)
class IpAdapter:
    """An IP-Adapter for one pipeline.

    Attributes:
        weights: it alone.
        encoder: makes image embeds of pixels; CLIP's.
        processor: makes pixels of pictures.
    """

    weights: IpAdapters
    encoder: Any
    processor: CLIPImageProcessor

    @staticmethod
    def load(file: Path, pipe: DiffusionPipeline) -> IpAdapter:
        """Loads an IP-Adapter's file, and its image encoder from the folder ``image_encoder`` beside it.

        Raises:
            InputError: a file is missing, damaged, or of another model; the pipeline's denoiser is no engine that takes
                image prompts.
        """
        denoiser = denoiser_of(pipe)
        slots = _slots_of(denoiser)
        weights = read_ip_adapter(file)
        folder = file.parent / ENCODER
        if not folder.is_dir():
            raise InputError(f"IP-Adapter {file} has no image encoder: put it into {folder}, in transformers' format")
        adapters = IpAdapters([weights], [str(file)], dict(denoiser.config), slots)
        encoder = load_network(folder, CLIPVisionModelWithProjection, denoiser.dtype).eval().requires_grad_(False)
        size = encoder.config.image_size
        # as diffusers makes it where a pipeline has none
        processor = CLIPImageProcessor(size=size, crop_size=size)
        placed = adapters.to(pipe.device, denoiser.dtype)
        return IpAdapter(placed, encoder.to(pipe.device), processor)

    @torch.no_grad()
    def embeds(self, picture: Image, like: Tensor, *, guided: bool) -> Tensor:
        """Encodes a picture: [batch, 1, ...], without it and with it where ``guided``, else with it."""
        pixels = self.processor(picture, return_tensors="pt").pixel_values.to(like)
        if isinstance(self.weights.projection.image_projection_layers[0], ImageProjection):
            own = self.encoder(pixels).image_embeds
            without = torch.zeros_like(own)
        else:
            own, without = (
                self.encoder(each, output_hidden_states=True).hidden_states[-2]
                for each in (pixels, torch.zeros_like(pixels))
            )
        return torch.cat([without, own] if guided else [own])[:, None]


@dataclass(frozen=True)
class ImagePrompt:
    """An IP-Adapter, the picture that it reads, and its strength, 0 to 10."""

    adapter: IpAdapter
    picture: Image
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and 0 <= self.scale <= MOST_SCALE):
            raise InputError(
                f"an image prompt's scale of {self.scale:g} is out of range: give one from 0 to {MOST_SCALE:g}"
            )


def check_image_prompts(denoiser: object, count: int) -> None:
    """Checks that a denoiser takes so many image prompts at once. Raises InputError where it does not."""
    if count and count > (most := _slots_of(denoiser).adapters):
        raise InputError(
            f"{count} image prompts at once, this engine takes {most}: export with --image-adapters {count}"
        )


def prompted(denoiser: EngineUNet, prompts: Sequence[ImagePrompt], *, guided: bool) -> EngineUNet:
    """Makes a denoiser like ``denoiser``, on its runner and with its LoRAs, for one picture with image prompts.

    Raises:
        InputError: it takes none, or not so many.
    """
    check_image_prompts(denoiser, len(prompts))
    like = torch.zeros(2 if guided else 1, device=denoiser.device, dtype=denoiser.dtype)
    rows = []
    for prompt in prompts:
        ((keys, values),) = prompt.adapter.weights.prompts([prompt.adapter.embeds(prompt.picture, like, guided=guided)])
        rows.append((keys, values * prompt.scale))
    own: EngineUNet = copy.copy(denoiser)
    own.prompted = packed(_slots_of(denoiser), like, rows)
    return own


def _slots_of(denoiser: object) -> ImageSlots:
    if not isinstance(denoiser, EngineUNet) or denoiser.images is None:
        raise InputError("this engine takes no image prompts: export with --image-tokens, and build again")
    return denoiser.images
