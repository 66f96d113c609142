"""The SD3 kind: joint attention of text and picture, modulated by pooled text, trained as a rectified flow."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from autoencoder import draw
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from text_encoders import encode_captions, train_projection, train_second_encoder
from training import Schedule

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from diffusers import StableDiffusionPipeline
    from diffusers.models.attention_processor import Attention
    from torch import Tensor, nn

SCHEDULE = Schedule(iterations=5_000, peak=1e-3, warmup=300, ema=0.999, weight_decay=0.01)
GUIDANCE_SCALE = 2.0
SHIFT = 2.0
SIGMA_LOGIT_MEAN, SIGMA_LOGIT_STD = 0.6, 1.2  # towards noise, where number and place of the objects are decided
ZERO_TOKENS = (8, 64, 256)  # in place of the missing T5's: what ``max_sequence_length`` says, 256 unless told otherwise


def assemble(folder: Path, base: StableDiffusionPipeline) -> StableDiffusion3Pipeline:
    """Assembles the pipeline with an untrained transformer (seeded by the caller) and trained text encoders; no T5."""
    first = train_projection(folder, base.tokenizer, base.text_encoder)
    second = train_second_encoder(folder, base.tokenizer, base.text_encoder)
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        num_attention_heads=6,
        attention_head_dim=16,
        joint_attention_dim=256,
        caption_projection_dim=96,
        pooled_projection_dim=first.config.projection_dim + second.config.projection_dim,
        pos_embed_max_size=8,
    )
    vae = AutoencoderKL.from_config(dict(base.vae.config) | {"shift_factor": 0.0})
    vae.load_state_dict(base.vae.state_dict())
    return StableDiffusion3Pipeline(
        vae=vae.eval(),
        text_encoder=first,
        text_encoder_2=second,
        text_encoder_3=None,
        tokenizer=base.tokenizer,
        tokenizer_2=base.tokenizer,
        tokenizer_3=None,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT),
    )


def loss(pipe: StableDiffusion3Pipeline, latents: Tensor, captions: list[str]) -> Callable[[torch.Generator], Tensor]:
    """Returns a function of the error of the flow from picture to noise, at logit-normal times."""
    text, empty = encode_captions(pipe, captions, prompt_2=None, prompt_3=None, max_sequence_length=1)
    attention = RepeatedTokenAttention()
    pipe.transformer.set_attn_processor(attention)

    def loss_of(generator: torch.Generator) -> Tensor:
        batch = draw(latents, generator)
        states, pooled = text.batch(batch.chosen, batch.kept, empty)
        logit = SIGMA_LOGIT_MEAN + SIGMA_LOGIT_STD * torch.randn(len(states), 1, 1, 1, generator=generator)
        sigma = logit.sigmoid()
        clean = latents[batch.chosen]
        attention.count = ZERO_TOKENS[torch.randint(len(ZERO_TOKENS), (), generator=generator)]
        flow = pipe.transformer(
            hidden_states=(1 - sigma) * clean + sigma * batch.noise,
            timestep=1000 * sigma.flatten(),
            encoder_hidden_states=states,
            pooled_projections=pooled,
        ).sample
        return torch.nn.functional.mse_loss(flow, batch.noise - clean)

    return loss_of


class RepeatedTokenAttention:
    """SD3's joint attention, in which the last text token stands for ``count`` tokens.

    All tokens of the missing T5 are zeros, have no position, and so stay equal through every layer. One of them with
    ``log(count)`` added to its attention logits is exactly ``count`` of them, at a fraction of the time.
    """

    def __init__(self, count: int = 1) -> None:
        self.count = count

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: object
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attends with picture and text tokens [n, tokens, width] to both; SD3.5's second attention has no text."""
        own = _heads(attn, hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
        if encoder_hidden_states is None:
            mixed = torch.nn.functional.scaled_dot_product_attention(*own)
            return attn.to_out[0](mixed.transpose(1, 2).flatten(2))
        projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        added = _heads(attn, encoder_hidden_states, projections, (attn.norm_added_q, attn.norm_added_k))
        query, key, value = (torch.cat(pair, 2) for pair in zip(own, added, strict=True))
        bias = query.new_zeros(key.shape[2])
        bias[-1] = math.log(self.count)
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias.expand(1, 1, 1, -1))
        picture, text = (
            mixed.transpose(1, 2).flatten(2).split([hidden_states.shape[1], encoder_hidden_states.shape[1]], 1)
        )
        return attn.to_out[0](picture), text if attn.context_pre_only else attn.to_add_out(text)


def _heads(
    attn: Attention,
    states: Tensor,
    projections: tuple[nn.Module, nn.Module, nn.Module],
    norms: tuple[nn.Module | None, nn.Module | None],
) -> tuple[Tensor, Tensor, Tensor]:
    """Projects states to queries, keys and values [n, heads, tokens, width], normalized where the network does so."""
    query, key, value = (
        projection(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for projection in projections
    )
    query, key = (part if norm is None else norm(part) for norm, part in zip(norms, (query, key), strict=True))
    return query, key, value
