"""Untrained ControlNets whose zero convolutions are not zero, for pipelines of every family; an engine's stand-in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import ControlNetModel, SD3ControlNetModel
from PIL import Image

from s2p_deploy.errors import IntegrityError
from s2p_deploy.families import family_of
from s2p_deploy.pipeline import EngineControlNet
from s2p_deploy.records import ShapeProfile, TensorSpec

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import ModelMixin

EMBEDDING = (4, 8, 8, 8)  # channels on the way from 64x64 pixels to 8x8 latents


def small_controlnet(denoiser: ModelMixin, seed: int = 0) -> ModelMixin:
    """Begins as a copy of the denoiser; its residuals have a tenth of the size of activations."""
    torch.manual_seed(seed)
    if type(denoiser).__name__ == "SD3Transformer2DModel":
        network = SD3ControlNetModel.from_transformer(denoiser, num_layers=2, num_extra_conditioning_channels=0)
        zeros = [*network.controlnet_blocks, network.pos_embed_input.proj]
    else:
        network = ControlNetModel.from_unet(denoiser, conditioning_embedding_out_channels=EMBEDDING)
        embedding = network.controlnet_cond_embedding.conv_out
        zeros = [*network.controlnet_down_blocks, network.controlnet_mid_block, embedding]
    for layer in zeros:
        torch.nn.init.normal_(layer.weight, std=0.1 / layer.weight[0].numel() ** 0.5)
    return network.eval()


def residual_specs(denoiser: ModelMixin) -> tuple[TensorSpec, ...]:
    """The inputs for residuals that an engine of the denoiser has."""
    shapes = family_of(denoiser).residual_inputs(denoiser)
    return tuple(TensorSpec(name, "float32", shape) for name, shape in shapes.items())


def control_picture(seed: int = 0, size: int = 64) -> Image.Image:
    """White rectangles' edges on black."""
    random = np.random.default_rng(seed)
    pixels = np.zeros((size, size, 3), np.uint8)
    (top, left), (bottom, right) = random.integers(4, size // 2, 2), random.integers(size // 2, size - 4, 2)
    pixels[top:bottom, left:right] = 255
    pixels[top + 1 : bottom - 1, left + 1 : right - 1] = 0
    return Image.fromarray(pixels)


class OpenedEngines:
    """Takes the place of ``open_controlnet``: notes the devices that engines are opened for, and how many are open.

    ``most`` engines can be opened (None: any number); the next one fails.
    """

    def __init__(self, most: int | None = None) -> None:
        self.devices: list[str] = []
        self.open = 0
        self.most = most

    def __call__(
        self, _folder: Path, _config: object, _factor: int, _dtype: torch.dtype | None = None, device: str = "auto"
    ) -> EngineControlNet:
        if self.open == self.most:
            raise IntegrityError("another one cannot be opened")
        self.devices.append(device)
        self.open += 1
        return _EngineStandIn(self)


class _EngineStandIn(EngineControlNet):
    def __init__(self, engines: OpenedEngines) -> None:
        torch.nn.Module.__init__(self)
        self.engines, self._config, self.maps = engines, {}, []
        self.engine = SimpleNamespace(mixed_timesteps=True)
        self.bound = SimpleNamespace(profile=ShapeProfile(), close=self.close)

    def close(self) -> None:
        self.engines.open -= 1
