"""Training pictures: random scenes of the grammar without its held-out combinations, drawn once from a fixed seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from s2p_deploy.shapes.scenes import caption, render, sample_scene

if TYPE_CHECKING:
    from s2p_deploy.shapes.scenes import Scene


def training_scenes(count: int, seed: int = 0) -> tuple[Tensor, list[str]]:
    """Renders pictures uint8 [count, 3, 64, 64] and writes their captions."""
    rng = np.random.default_rng(seed)
    scenes = _sample(count, rng)
    pictures = np.stack([render(scene, rng) for scene in scenes])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), [caption(scene) for scene in scenes]


def training_captions(count: int, seed: int = 0) -> list[str]:
    """Writes the captions of :func:`training_scenes` without rendering pictures."""
    return [caption(scene) for scene in _sample(count, np.random.default_rng(seed))]


def to_unit(pictures: Tensor) -> Tensor:
    """Scales uint8 pictures to float32 in [-1, 1], the range of diffusers' image processor."""
    return pictures.float() / 127.5 - 1


def _sample(count: int, rng: np.random.Generator) -> list[Scene]:
    return [sample_scene(rng, held_out=False) for _ in range(count)]
