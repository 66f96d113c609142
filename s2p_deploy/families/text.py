"""Prompts to what a denoiser is told about them, by the pipeline's own text encoders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionXLPipeline

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffusers import DiffusionPipeline
    from torch import Tensor


@dataclass(frozen=True)
class EncodedText:
    """``states`` float32 [n, tokens, D]; ``added_cond`` float32 [n, A], what the time features depend on, or [n, 0]."""

    states: Tensor
    added_cond: Tensor

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, index: int | slice | Tensor) -> EncodedText:
        """One of them, without the first axis, or some."""
        return EncodedText(self.states[index], self.added_cond[index])

    def to(self, device: torch.device) -> EncodedText:
        """The same on a device."""
        return EncodedText(self.states.to(device), self.added_cond.to(device))

    @staticmethod
    def cat(parts: Sequence[EncodedText]) -> EncodedText:
        """All parts, one behind the other."""
        return EncodedText(torch.cat([p.states for p in parts]), torch.cat([p.added_cond for p in parts]))

    @staticmethod
    def stack(texts: Sequence[EncodedText]) -> EncodedText:
        """Single ones side by side."""
        return EncodedText(torch.stack([t.states for t in texts]), torch.stack([t.added_cond for t in texts]))


@torch.no_grad()
def encode_texts(
    pipe: DiffusionPipeline, texts: Sequence[str], *, negative: bool, max_sequence_length: int
) -> EncodedText:
    """What the pipeline makes of prompts, or of negative prompts, where its text encoder is; on the CPU.

    SDXL takes zeros for an empty negative prompt, and the sizes of a picture of the model's own size. SD3's states are
    followed by ``max_sequence_length`` tokens of the third encoder, or zeros in their place.
    """
    asked: dict[str, Any] = {
        "device": pipe.text_encoder.device,
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": False,
    }
    if isinstance(pipe, StableDiffusionXLPipeline):
        states, _, pooled, _ = pipe.encode_prompt(list(texts), **asked)
        if negative and pipe.config.force_zeros_for_empty_prompt:
            kept = torch.tensor([bool(text) for text in texts], device=states.device)
            states, pooled = states * kept.view(-1, 1, 1), pooled * kept.view(-1, 1)
        return _on_cpu(states, torch.cat([pooled, _size_ids(pipe, pooled)], 1))
    if isinstance(pipe, StableDiffusion3Pipeline):
        states, _, pooled, _ = pipe.encode_prompt(
            list(texts), None, None, max_sequence_length=max_sequence_length, **asked
        )
        return _on_cpu(states, pooled)
    states, _ = pipe.encode_prompt(list(texts), **asked)
    return _on_cpu(states, states.new_zeros(len(states), 0))


def text_tokens(pipe: DiffusionPipeline, max_sequence_length: int) -> int:
    """Number of tokens of a text state."""
    padded = max_sequence_length if isinstance(pipe, StableDiffusion3Pipeline) else 0
    return int(pipe.tokenizer.model_max_length) + padded


def _size_ids(pipe: StableDiffusionXLPipeline, like: Tensor) -> Tensor:
    """Original size, crop and target size [n, 6] of pictures of the model's own size, uncropped."""
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    ids = like.new_tensor([size, size, 0, 0, size, size])
    return ids.expand(len(like), -1)


def _on_cpu(states: Tensor, added_cond: Tensor) -> EncodedText:
    return EncodedText(states.float().cpu(), added_cond.float().cpu())
