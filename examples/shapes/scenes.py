"""Training pictures: random scenes of the grammar without its held-out combinations, drawn once from a fixed seed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from s2p_deploy.shapes.grammar import caption, sample_scene
from s2p_deploy.shapes.renderer import render


def training_scenes(count: int, seed: int = 0) -> tuple[Tensor, list[str]]:
    """Pictures uint8 [count, 3, 64, 64] and their captions."""
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng, held_out=False) for _ in range(count)]
    pictures = np.stack([render(scene, rng) for scene in scenes])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), [caption(scene) for scene in scenes]


def to_unit(pictures: Tensor) -> Tensor:
    """uint8 pictures as float32 in [-1, 1], the range of diffusers' image processor."""
    return pictures.float() / 127.5 - 1
