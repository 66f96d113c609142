"""Image prompts of IP-Adapters: the graph's inputs for them, and which columns of those each attention reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, PositiveFloat, model_validator, with_config

from s2p_deploy.records.typed_json import OPEN, Name

IMAGE_KEYS, IMAGE_VALUES, IMAGE_BIAS = "image_keys", "image_values", "image_bias"
MOST_IMAGE_TOKENS, MOST_IMAGE_ADAPTERS = 1024, 16


@with_config(OPEN)
@dataclass(frozen=True)
class ImageSlot:
    """A cross-attention's columns of ``image_keys`` and ``image_values``.

    ``layer`` is its path in the denoiser as diffusers names it, ``scale`` the factor of its scores, which the keys
    bring along.
    """

    layer: Name
    start: Annotated[int, Field(ge=0, le=2**30)]
    width: Annotated[int, Field(ge=1, le=2**20)]
    scale: PositiveFloat


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
    def most_tokens(self) -> int:
        """Returns the tokens of all adapters."""
        return self.tokens * self.adapters
