"""Tokenizer and text encoders of the bundled pipelines, and the text states that they give a denoiser.

The text encoder is a small CLIP text model, trained on captions alone to predict, at its last token, the object in each
of the four places. A diffusion loss teaches a text encoder this last of all; taught beforehand it costs minutes.

The encoders with a pooled output, for the SDXL and SD3 siblings, are trained likewise: the pooled output, which CLIP
takes at the *first* end token, and the penultimate hidden state at the last token, which is where these pipelines read
the text, must each predict the layout.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from training import Schedule, train
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from s2p_deploy.shapes.scenes import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, caption, parse, sample_scene

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

MAX_TOKENS = 24
BATCH = 256
SCHEDULE = Schedule(iterations=2_500, peak=2e-3, warmup=100, ema=0.99)
WIDTH = 128
SECOND_SCHEDULE = Schedule(iterations=1_000, peak=2e-3, warmup=100, ema=0.99, seed=1)
PROJECTION_SCHEDULE = Schedule(iterations=300, peak=5e-3, warmup=50, ema=0.99, seed=2)
SECOND_WIDTH = 96  # not the first encoder's, as in SDXL and SD3
ENCODED_AT_ONCE = 500


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Builds a CLIP byte-pair tokenizer whose merges make every word of the grammar one token."""
    words = sorted(
        {word for group in (SIZES, COLOURS, SHAPES, PLACES, BACKGROUNDS) for text in group for word in text.split()}
    )
    words = sorted({*words, "a", "and", "at", "the", "background", ","}, key=lambda word: (-len(word), word))
    letters = [chr(code) for code in range(33, 127)]
    tokens = letters + [f"{letter}</w>" for letter in letters]
    merges = []
    for word in words:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        for end in range(1, len(pieces)):
            left, right = "".join(pieces[:end]), pieces[end]
            if (left, right) not in merges:
                merges.append((left, right))
            if left + right not in tokens:
                tokens.append(left + right)
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS, pad_token="<|endoftext|>")


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Tokenizes texts to ids int64 [n, 24], as a diffusers pipeline does."""
    return tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt").input_ids


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Makes an untrained text encoder (seeded by the caller)."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train_text(folder: Path) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Trains (or goes on with) the text encoder to predict the layout that a caption describes."""
    tokenizer = build_tokenizer(folder / "tokenizer")
    torch.manual_seed(0)
    encoder = new_text_encoder(tokenizer)
    net = torch.nn.ModuleDict({"encoder": encoder, **layout_heads(WIDTH)})
    ids, layouts = text_examples(tokenizer)

    def loss_of(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(ids), (BATCH,), generator=generator)
        hidden = net["encoder"](ids[chosen]).last_hidden_state[:, -1]
        return layout_loss(net, hidden, layouts[chosen])

    net.load_state_dict(train(net, loss_of, SCHEDULE, folder / "text.safetensors"))
    return tokenizer, encoder.eval()


def text_examples(tokenizer: CLIPTokenizer) -> tuple[Tensor, Tensor]:
    """Makes token ids int64 [40000, 24] of training captions, and the :func:`layout` int64 [40000, 13] of each."""
    rng = np.random.default_rng(1)
    captions = [caption(sample_scene(rng, held_out=False)) for _ in range(40_000)]
    return tokenize(tokenizer, captions), torch.tensor([layout(text) for text in captions])


def layout_heads(width: int) -> dict[str, nn.Module]:
    """Makes untrained linear heads that predict a layout from a text state of ``width`` channels."""
    places = torch.nn.ModuleList(torch.nn.Linear(width, len(COLOURS) + 1 + len(SHAPES) + len(SIZES)) for _ in PLACES)
    return {"places": places, "background": torch.nn.Linear(width, len(BACKGROUNDS))}


def layout(text: str) -> list[int]:
    """Codes the layout of a caption: per place colour (0 = empty), shape, size (-1 = ignored); then the background."""
    scene = parse(text)
    by_place = {item.place: item for item in scene.objects}
    codes = []
    for place in PLACES:
        item = by_place.get(place)
        codes += (
            [0, -1, -1]
            if item is None
            else [1 + COLOURS.index(item.colour), SHAPES.index(item.shape), SIZES.index(item.size)]
        )
    return [*codes, BACKGROUNDS.index(scene.background)]


def layout_loss(net: nn.ModuleDict, hidden: Tensor, layouts: Tensor) -> Tensor:
    """Computes the cross-entropy of the heads in ``net`` on text states [n, width], summed over the attributes."""
    entropy = torch.nn.functional.cross_entropy
    loss = entropy(net["background"](hidden), layouts[:, -1])
    for index, head in enumerate(net["places"]):
        parts = head(hidden).split([len(COLOURS) + 1, len(SHAPES), len(SIZES)], dim=1)
        for offset, logits in enumerate(parts):
            loss = loss + entropy(logits, layouts[:, 3 * index + offset], ignore_index=-1)
    return loss


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
    return _train_projected(encoder, tokenizer, SECOND_SCHEDULE, folder / "text_second.safetensors")


def train_projection(folder: Path, tokenizer: CLIPTokenizer, first: CLIPTextModel) -> CLIPTextModelWithProjection:
    """Trains (or goes on with) a projection on the pooled output of the bundled text encoder, which stays as it is."""
    torch.manual_seed(2)
    encoder = CLIPTextModelWithProjection(first.config)
    encoder.text_model.load_state_dict(first.state_dict())
    encoder.text_model.requires_grad_(False)
    return _train_projected(encoder, tokenizer, PROJECTION_SCHEDULE, folder / "text_projection.safetensors")


def _train_projected(
    encoder: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer, schedule: Schedule, checkpoint: Path
) -> CLIPTextModelWithProjection:
    config = encoder.config
    pooled = torch.nn.ModuleDict(layout_heads(config.projection_dim))
    penultimate = torch.nn.ModuleDict(layout_heads(config.hidden_size))
    net = torch.nn.ModuleDict({"encoder": encoder, "pooled": pooled, "penultimate": penultimate})
    ids, layouts = text_examples(tokenizer)

    def loss_of(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(ids), (BATCH,), generator=generator)
        out = encoder(ids[chosen], output_hidden_states=True)
        last = out.hidden_states[-2][:, -1]
        return layout_loss(pooled, out.text_embeds, layouts[chosen]) + layout_loss(penultimate, last, layouts[chosen])

    net.load_state_dict(train(net, loss_of, schedule, checkpoint))
    return encoder.eval()


@dataclass(frozen=True)
class TextStates:
    """Text states float16 [n, tokens, width] and, of SDXL and SD3, pooled text float16 [n, pooled]."""

    states: Tensor
    pooled: Tensor | None

    def batch(self, chosen: Tensor, kept: Tensor, empty: TextStates) -> tuple[Tensor, Tensor | None]:
        """Selects float32 states and pooled text of captions; ``empty``'s where ``kept`` bool [batch] is False."""
        states = torch.where(kept[:, None, None], self.states[chosen], empty.states).float()
        if self.pooled is None or empty.pooled is None:
            return states, None
        return states, torch.where(kept[:, None], self.pooled[chosen], empty.pooled).float()


@torch.no_grad()
def encode_captions(pipe: DiffusionPipeline, captions: list[str], **arguments: object) -> tuple[TextStates, TextStates]:
    """Encodes all captions, and returns the states that guidance takes for no caption too (one of each).

    ``arguments`` go to the pipeline's ``encode_prompt``, which returns (states, states of none) of SD and
    (states, states of none, pooled, pooled of none) of SDXL and SD3.
    """
    parts = []
    for start in range(0, len(captions), ENCODED_AT_ONCE):
        outputs = _encode(pipe, captions[start : start + ENCODED_AT_ONCE], guided=False, **arguments)
        parts.append([outputs[index].half() for index in range(0, len(outputs), 2)])
    none = [part.half() for part in _encode(pipe, captions[:1], guided=True, **arguments)[1::2]]
    return _states([torch.cat(part) for part in zip(*parts, strict=True)]), _states(none)


def _encode(pipe: DiffusionPipeline, captions: list[str], *, guided: bool, **arguments: object) -> tuple[Tensor, ...]:
    outputs: tuple[Tensor, ...] = pipe.encode_prompt(
        prompt=captions, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=guided, **arguments
    )
    return outputs


def _states(parts: list[Tensor]) -> TextStates:
    return TextStates(parts[0], parts[1] if len(parts) > 1 else None)
