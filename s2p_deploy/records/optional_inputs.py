"""Optional inputs: what a graph takes where it was exported for adapters. Left out of a call, they are zeros.

Zeros change no prediction: low-rank branches, a ControlNet's residuals and an IP-Adapter's attention add to what the
network computes. Slots say which part of an input is whose.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveFloat, model_validator, with_config

from s2p_deploy.records.typed_json import OPEN, Name

if TYPE_CHECKING:
    from collections.abc import Mapping

LORA_DOWN, LORA_UP, LORA_STRENGTHS = "lora_down", "lora_up", "lora_strengths"
LORA_INPUTS = (LORA_DOWN, LORA_UP, LORA_STRENGTHS)
BOUND_MATRICES = frozenset({LORA_DOWN, LORA_UP})  # replaced when adapters change, never given per step
IMAGE_KEYS, IMAGE_VALUES, IMAGE_BIAS = "image_keys", "image_values", "image_bias"
IMAGE_REACH = "image_reach"
IMAGE_INPUTS = (IMAGE_KEYS, IMAGE_VALUES, IMAGE_BIAS, IMAGE_REACH)
MID_RESIDUAL = "mid_residual"
_RESIDUAL = re.compile(r"down_residual_\d+|mid_residual|block_residual_\d+")
_FRACTION = re.compile(r"(\w+)/(\d+)")

MOST_RANK = 1024
MOST_IMAGE_TOKENS, MOST_IMAGE_ADAPTERS = 1024, 16
Place = Annotated[int, Field(ge=0, le=2**40)]
Channels = Annotated[int, Field(ge=1, le=2**20)]


def is_optional(name: str) -> bool:
    """Tells whether an input may be left out of a call."""
    return name in LORA_INPUTS or name in IMAGE_INPUTS or is_residual(name)


def is_residual(name: str) -> bool:
    """Tells whether an input is a residual that a ControlNet gives."""
    return _RESIDUAL.fullmatch(name) is not None


def down_residual(number: int) -> str:
    """Names the input that is added to a UNet's shortcut of that number, the first convolution's being 0."""
    return f"down_residual_{number}"


def block_residual(number: int) -> str:
    """Names the input that is added behind a transformer's block of that number."""
    return f"block_residual_{number}"


def open_size(name: str, sizes: Mapping[str, int]) -> int | None:
    """Returns an open size by its name, or a fraction of one; None where that is not known.

    Residuals have such sizes: they follow height and width of the latents.

    Example:
        >>> open_size("height/4", {"height": 8})
        2
    """
    whole, divisor = fraction_of(name)
    return sizes[whole] // divisor if whole in sizes else None


def fraction_of(name: str) -> tuple[str, int]:
    """Splits the name of an open size, such as ``height/4``, into the size that it follows and the divisor."""
    fraction = _FRACTION.fullmatch(name)
    return (name, 1) if fraction is None else (fraction[1], int(fraction[2]))


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
    width: Channels
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


@with_config(OPEN)
@dataclass(frozen=True)
class ImageSlot:
    """A cross-attention's columns of ``image_keys`` and ``image_values``; its number is its column of ``image_reach``.

    ``layer`` is its path in the denoiser as diffusers names it, ``scale`` the factor of its scores, which the keys
    bring along, and ``quantizer`` the activation quantizer behind it, whose grid grows by the reach (None: its result
    stays in floating point).
    """

    layer: Name
    start: Annotated[int, Field(ge=0, le=2**30)]
    width: Annotated[int, Field(ge=1, le=2**20)]
    scale: PositiveFloat
    quantizer: Name | None = None


@with_config(OPEN)
@dataclass(frozen=True)
class ImageSlots:
    """Image prompts that a graph takes: of ``adapters`` IP-Adapters at once, of each up to ``tokens`` tokens.

    Example:
        >>> ImageSlots(4, 2, (ImageSlot("mid_block.attentions.0.transformer_blocks.0.attn2", 0, 64, 0.25),)).width
        64
    """

    tokens: Annotated[int, Field(ge=1, le=MOST_IMAGE_TOKENS)]
    adapters: Annotated[int, Field(ge=1, le=MOST_IMAGE_ADAPTERS)]
    layers: Annotated[tuple[ImageSlot, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _check_layers(self) -> ImageSlots:
        ends = [0, *(slot.start + slot.width for slot in self.layers)]
        if [slot.start for slot in self.layers] != ends[:-1]:
            raise ValueError("the columns of attentions must follow each other")
        if len({slot.layer for slot in self.layers}) != len(self.layers):
            raise ValueError("attentions must have columns once")
        return self

    @property
    def width(self) -> int:
        """Returns the columns of all attentions."""
        return self.layers[-1].start + self.layers[-1].width

    @property
    def quantizers(self) -> tuple[str, ...]:
        """Returns the activation quantizers whose grids grow; without one there is no ``image_reach``."""
        return tuple(slot.quantizer for slot in self.layers if slot.quantizer is not None)

    @property
    def most_tokens(self) -> int:
        """Returns the tokens of all adapters."""
        return self.tokens * self.adapters
