"""What a pipeline feeds its denoiser for a caption, and for the empty one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

_BATCH = 500


@dataclass(frozen=True)
class TextStates:
    """Text states float16 [n, tokens, width] and, of SDXL and SD3, pooled text float16 [n, pooled]."""

    states: Tensor
    pooled: Tensor | None

    def batch(self, chosen: Tensor, kept: Tensor, empty: TextStates) -> tuple[Tensor, Tensor | None]:
        """Float32 states and pooled text of the chosen captions; ``empty``'s where ``kept`` bool [batch] is False."""
        states = torch.where(kept[:, None, None], self.states[chosen], empty.states).float()
        if self.pooled is None or empty.pooled is None:
            return states, None
        return states, torch.where(kept[:, None], self.pooled[chosen], empty.pooled).float()


@torch.no_grad()
def encode_captions(pipe: DiffusionPipeline, captions: list[str], **arguments: object) -> tuple[TextStates, TextStates]:
    """The states of all captions, and those that guidance takes for no caption (one of each).

    ``arguments`` go to the pipeline's ``encode_prompt``, whose answers are (states, states of none) of SD and
    (states, states of none, pooled, pooled of none) of SDXL and SD3.
    """
    parts = []
    for start in range(0, len(captions), _BATCH):
        answer = _encode(pipe, captions[start : start + _BATCH], guided=False, **arguments)
        parts.append([answer[index].half() for index in range(0, len(answer), 2)])
    none = [part.half() for part in _encode(pipe, captions[:1], guided=True, **arguments)[1::2]]
    return _states([torch.cat(part) for part in zip(*parts, strict=True)]), _states(none)


def _encode(pipe: DiffusionPipeline, captions: list[str], *, guided: bool, **arguments: object) -> tuple[Tensor, ...]:
    answer: tuple[Tensor, ...] = pipe.encode_prompt(
        prompt=captions, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=guided, **arguments
    )
    return answer


def _states(parts: list[Tensor]) -> TextStates:
    return TextStates(parts[0], parts[1] if len(parts) > 1 else None)
