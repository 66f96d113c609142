"""Networks of every family that run in milliseconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests import tiny_networks
from tests.tiny_networks import tiny_mmdit, tiny_refiner_unet, tiny_sdxl_unet

if TYPE_CHECKING:
    from diffusers import SD3Transformer2DModel, UNet2DConditionModel

FAMILIES = ("sd1", "sdxl", "sd3", "sd3.5", "inpainting", "lcm", "lcm-sdxl", "refiner", "sd3-inpainting")


@pytest.fixture
def tiny_unet() -> UNet2DConditionModel:
    return tiny_networks.tiny_unet(cross_attention_dim=12).eval()


@pytest.fixture
def sdxl_unet() -> UNet2DConditionModel:
    return tiny_sdxl_unet()


@pytest.fixture
def mmdit() -> SD3Transformer2DModel:
    return tiny_mmdit()


@pytest.fixture(params=FAMILIES)
def network(request: pytest.FixtureRequest) -> torch.nn.Module:
    """One network of every family."""
    makers = {
        "sd1": lambda: tiny_networks.tiny_unet(cross_attention_dim=12).eval(),
        "sdxl": tiny_sdxl_unet,
        "sd3": tiny_mmdit,
        "sd3.5": lambda: tiny_mmdit(dual=(0, 1)),
        "inpainting": lambda: tiny_networks.tiny_unet(cross_attention_dim=12, in_channels=9).eval(),
        "lcm": lambda: tiny_networks.tiny_unet(cross_attention_dim=12, time_cond_proj_dim=6).eval(),
        "lcm-sdxl": lambda: tiny_sdxl_unet(time_cond_proj_dim=6),
        "refiner": tiny_refiner_unet,
        "sd3-inpainting": lambda: tiny_mmdit(channels=9),
    }
    return makers[request.param]()
