"""Text conditioning: prompts encoded by the pipeline's own text encoders, as every family's denoiser takes them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from s2p_deploy.families.model_family import guidance_width

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from diffusers import DiffusionPipeline
    from torch import Tensor


@dataclass(frozen=True)
class EncodedText:
    """Encoded prompts: ``states`` float32 [n, tokens, D] and ``added_cond`` float32 [n, A].

    The time features depend on ``added_cond`` besides the timestep; where they do not, A is 0.
    """

    states: Tensor
    added_cond: Tensor

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, index: int | slice | Tensor) -> EncodedText:
        """Selects one prompt, without the first axis, or some."""
        return EncodedText(self.states[index], self.added_cond[index])

    def to(self, device: torch.device) -> EncodedText:
        """Moves both tensors to a device."""
        return EncodedText(self.states.to(device), self.added_cond.to(device))

    @staticmethod
    def cat(texts: Sequence[EncodedText]) -> EncodedText:
        """Concatenates along the first axis."""
        return EncodedText(torch.cat([t.states for t in texts]), torch.cat([t.added_cond for t in texts]))

    @staticmethod
    def stack(texts: Sequence[EncodedText]) -> EncodedText:
        """Stacks single prompts, which have no first axis."""
        return EncodedText(torch.stack([t.states for t in texts]), torch.stack([t.added_cond for t in texts]))


@torch.no_grad()
def encode_texts(
    pipe: DiffusionPipeline,
    texts: Sequence[str],
    *,
    negative: bool,
    max_sequence_length: int,
    guidance_scale: float = 1.0,
) -> EncodedText:
    """Encodes prompts, or negative prompts, as the pipeline does.

    Args:
        pipe: a pipeline; its text encoders run where they are.
        texts: prompts.
        negative: encodes them as negative prompts: SDXL takes zeros for an empty one.
        max_sequence_length: number of tokens of SD3's third encoder, whose states follow the others', or zeros where it
            is absent.
        guidance_scale: what LCM's networks read as an embedding; others do not.

    Returns:
        The encoded prompts, on the CPU. SDXL's size ids are those of a picture of the model's own size, a
        refiner's aesthetic scores its pipeline's defaults.
    """
    options: dict[str, Any] = {
        "device": _first(pipe, "text_encoder").device,
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": False,
    }
    guidance = _embedded_guidance(pipe, guidance_scale).expand(len(texts), -1)
    if _is_sdxl(pipe):
        states, _, pooled, _ = pipe.encode_prompt(list(texts), **options)
        if negative and pipe.config.force_zeros_for_empty_prompt:
            given = torch.tensor([bool(text) for text in texts], device=states.device)
            states, pooled = states * given.view(-1, 1, 1), pooled * given.view(-1, 1)
        ids = _size_ids(pipe, negative=negative).expand(len(texts), -1)
        return _on_cpu(states, torch.cat([part.to(states) for part in (pooled, ids, guidance)], 1))
    if is_sd3(pipe):
        states, _, pooled, _ = pipe.encode_prompt(
            list(texts), None, None, max_sequence_length=max_sequence_length, **options
        )
        return _on_cpu(states, pooled)
    states, _ = pipe.encode_prompt(list(texts), **options)
    return _on_cpu(states, guidance)


def is_sd3(pipe: DiffusionPipeline) -> bool:
    """Tells pipelines of Stable Diffusion 3, of any task."""
    return "transformer" in pipe.components


def _is_sdxl(pipe: DiffusionPipeline) -> bool:
    return "unet" in pipe.components and "text_encoder_2" in pipe.components


def _embedded_guidance(pipe: DiffusionPipeline, guidance_scale: float) -> Tensor:
    """Embeds a guidance scale as the pipeline does, [1, W]; W is 0 where the network does not read it."""
    unet = pipe.components.get("unet")
    width = 0 if unet is None else guidance_width(dict(unet.config))
    scale = torch.tensor([guidance_scale - 1])
    return pipe.get_guidance_scale_embedding(scale, embedding_dim=width) if width else torch.zeros(1, 0)


def text_tokens(pipe: DiffusionPipeline, max_sequence_length: int) -> int:
    """Returns the number of tokens of a text state."""
    padded = max_sequence_length if is_sd3(pipe) else 0
    return int(_first(pipe, "tokenizer").model_max_length) + padded


def encoded_widths(
    pipeline_class: str, configs: Mapping[str, Mapping[str, Any]], denoiser_width: int, *, scored: bool = False
) -> tuple[int, int]:
    """Computes the width of text states, and that of pooled text and size ids.

    Args:
        pipeline_class: name of the pipeline's class.
        configs: configurations of its text encoders, by their names; others are not read.
        denoiser_width: of the text states that the denoiser reads: what is narrower, SD3 pads to it where the third
            encoder is absent.
        scored: of SDXL's: it gives an aesthetic score in place of the target size.
    """
    encoders = {name: config for name, config in configs.items() if name.startswith("text_encoder")}
    clip = [config for name, config in encoders.items() if name != "text_encoder_3"]
    states = sum(config["hidden_size"] for config in clip)
    if pipeline_class.startswith("StableDiffusion3"):
        third = encoders.get("text_encoder_3")
        padded = denoiser_width if third is None else third["hidden_size"]
        return max(states, padded), sum(config["projection_dim"] for config in clip)
    if pipeline_class.startswith("StableDiffusionXL"):
        return states, encoders["text_encoder_2"]["projection_dim"] + (5 if scored else 6)
    return states, 0


def _first(pipe: DiffusionPipeline, kind: str) -> Any:  # noqa: ANN401 - transformers is not typed
    """Returns the first text encoder or tokenizer: SDXL's pipeline may lack one of its two."""
    parts = (pipe.components.get(name) for name in (kind, f"{kind}_2"))
    return next(part for part in parts if part is not None)


def _size_ids(pipe: DiffusionPipeline, *, negative: bool) -> Tensor:
    """Returns original size, crop, and target size or aesthetic score of pictures of the model's size, [1, n]."""
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    if not pipe.config.get("requires_aesthetics_score"):
        return torch.tensor([[size, size, 0, 0, size, size]])
    defaults = inspect.signature(type(pipe).__call__).parameters
    score = defaults["negative_aesthetic_score" if negative else "aesthetic_score"].default
    return torch.tensor([[size, size, 0, 0, score]])


def _on_cpu(states: Tensor, added_cond: Tensor) -> EncodedText:
    return EncodedText(states.float().cpu(), added_cond.float().cpu())
