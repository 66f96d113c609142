"""The SD3.5 kind: the SD3 sibling with normalized queries and keys, and a second attention in its first layers.

Fine-tuned: the second attention starts as a copy of the first one whose gate is closed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from sibling_sd3 import GUIDANCE_SCALE, loss
from training import Schedule

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

__all__ = ["GUIDANCE_SCALE", "SCHEDULE", "assemble", "loss"]

SCHEDULE = Schedule(iterations=1_500, peak=6e-4, warmup=100, ema=0.995, weight_decay=0.01)
DUAL_LAYERS = (0, 1, 2)  # the first half, as in SD3.5 medium


def assemble(_: Path, base: StableDiffusion3Pipeline) -> StableDiffusion3Pipeline:
    """Assembles the pipeline with a transformer that starts as the base's, but for the norms of queries and keys."""
    config = dict(base.transformer.config) | {"dual_attention_layers": DUAL_LAYERS, "qk_norm": "rms_norm"}
    transformer = SD3Transformer2DModel.from_config(config)
    weights = transformer.state_dict()
    weights |= {name: _widened(value, weights[name]) for name, value in base.transformer.state_dict().items()}
    copies = {name: name.replace(".attn2.", ".attn.") for name in weights if ".attn2." in name}
    weights |= {name: weights[first] for name, first in copies.items() if first in weights}
    transformer.load_state_dict(weights)
    return StableDiffusion3Pipeline(**base.components | {"transformer": transformer})


def _widened(value: Tensor, like: Tensor) -> Tensor:
    """Adds the modulation of a second attention to that of a layer, with a gate of zero."""
    if value.shape == like.shape:
        return value
    shift, scale, gate = value.chunk(6)[:3]
    return torch.cat([value, shift, scale, torch.zeros_like(gate)])
