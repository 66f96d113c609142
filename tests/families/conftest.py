"""A UNet of the SD1 kind that runs in a millisecond."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests import tiny_pipeline

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


@pytest.fixture
def tiny_unet() -> UNet2DConditionModel:
    return tiny_pipeline.tiny_unet(cross_attention_dim=12).eval()
