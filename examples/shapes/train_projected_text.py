"""Text encoders with a pooled output, for the SDXL and SD3 siblings.

Both are taught as the bundled one is (see train_text.py): the pooled output, which CLIP takes at the *first* end
token, and the penultimate hidden state at the last token, which is where these pipelines read the text, must each tell
what stands in each place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from train_text import BATCH, layout_heads, layout_loss, text_examples
from training import Schedule, train
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import CLIPTextModel, CLIPTokenizer

SECOND = Schedule(iterations=1_000, peak=2e-3, warmup=100, ema=0.99, seed=1)
PROJECTION = Schedule(iterations=300, peak=5e-3, warmup=50, ema=0.99, seed=2)
SECOND_WIDTH = 96  # not the first encoder's, as in SDXL and SD3


def train_second_encoder(folder: Path, tokenizer: CLIPTokenizer, first: CLIPTextModel) -> CLIPTextModelWithProjection:
    """Trains (or goes on with) the second text encoder: three layers, so that the penultimate has seen two."""
    torch.manual_seed(1)
    changes = {
        "hidden_size": SECOND_WIDTH,
        "intermediate_size": 2 * SECOND_WIDTH,
        "projection_dim": SECOND_WIDTH,
        "num_hidden_layers": 3,
        "hidden_act": "gelu",
    }
    encoder = CLIPTextModelWithProjection(CLIPTextConfig(**first.config.to_dict() | changes))
    return _train(encoder, tokenizer, SECOND, folder / "text_second.safetensors")


def train_projection(folder: Path, tokenizer: CLIPTokenizer, first: CLIPTextModel) -> CLIPTextModelWithProjection:
    """The bundled text encoder as it is, with a projection trained on its pooled output."""
    torch.manual_seed(2)
    encoder = CLIPTextModelWithProjection(first.config)
    encoder.text_model.load_state_dict(first.state_dict())
    encoder.text_model.requires_grad_(False)
    return _train(encoder, tokenizer, PROJECTION, folder / "text_projection.safetensors")


def _train(
    encoder: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer, schedule: Schedule, checkpoint: Path
) -> CLIPTextModelWithProjection:
    config = encoder.config
    pooled = torch.nn.ModuleDict(layout_heads(config.projection_dim))
    penultimate = torch.nn.ModuleDict(layout_heads(config.hidden_size))
    net = torch.nn.ModuleDict({"encoder": encoder, "pooled": pooled, "penultimate": penultimate})
    ids, answers = text_examples(tokenizer)

    def loss_of(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(ids), (BATCH,), generator=generator)
        out = encoder(ids[chosen], output_hidden_states=True)
        last = out.hidden_states[-2][:, -1]
        return layout_loss(pooled, out.text_embeds, answers[chosen]) + layout_loss(penultimate, last, answers[chosen])

    net.load_state_dict(train(net, loss_of, schedule, checkpoint))
    return encoder.eval()
