"""Optional inputs: what a graph takes where it was exported for adapters. Left out of a call, they are zeros.

Zeros change no prediction: low-rank branches, residuals and image attention add to what the network computes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator, with_config

from s2p_deploy.records.typed_json import OPEN, Name

LORA_DOWN, LORA_UP, LORA_STRENGTHS = "lora_down", "lora_up", "lora_strengths"
BOUND_MATRICES = frozenset({LORA_DOWN, LORA_UP})  # replaced when adapters change, never given per step
# A ControlNet's residuals, and an IP-Adapter's image tokens and scales.
_PER_STEP = re.compile(rf"{LORA_STRENGTHS}|down_residual_\d+|mid_residual|block_residual_\d+|image_\w+")

MOST_RANK = 1024
Place = Annotated[int, Field(ge=0, le=2**40)]
Channels = Annotated[int, Field(ge=1, le=2**20)]


def is_optional(name: str) -> bool:
    """Tells whether an input may be left out of a call."""
    return name in BOUND_MATRICES or _PER_STEP.fullmatch(name) is not None


@with_config(OPEN)
@dataclass(frozen=True)
class LoraSlot:
    """A layer's place in the packed matrices of low-rank branches.

    ``layer`` is its path in the denoiser as diffusers names it. A linear layer's down matrix [in, rank] begins at
    ``down``, its rows ``width`` ranks apart, because layers that read one tensor lie side by side; a convolution's is
    [rank, in, height, width] (``inputs`` without the rank). The up matrix, [rank, outputs] of a linear layer and
    [outputs, rank] of a convolution, begins at ``up``.
    """

    layer: Name
    op: Literal["conv", "linear"]
    inputs: Annotated[tuple[Channels, ...], Field(min_length=1, max_length=3)]
    outputs: Channels
    down: Place
    width: Annotated[int, Field(ge=1, le=64)]
    up: Place


@with_config(OPEN)
@dataclass(frozen=True)
class LoraSlots:
    """The low-rank branches of a graph: how many ranks each has, and the layers that have one."""

    rank: Annotated[int, Field(ge=1, le=MOST_RANK)]
    layers: Annotated[tuple[LoraSlot, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _check_layers(self) -> LoraSlots:
        if len({slot.layer for slot in self.layers}) != len(self.layers):
            raise ValueError("layers must have one slot each")
        return self
