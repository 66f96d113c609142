"""Tokenizer and text encoder of the bundled pipelines.

The text encoder is a small CLIP text model, trained on captions alone to tell, at its last token, what stands in each
of the four places. A diffusion loss teaches a text encoder this last of all; taught beforehand it costs minutes.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import torch
from training import Schedule, train
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from s2p_deploy.shapes.grammar import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, caption, parse, sample_scene

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

MAX_TOKENS = 24
BATCH = 256
SCHEDULE = Schedule(iterations=2_500, peak=2e-3, warmup=100, ema=0.99)
WIDTH = 128


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer whose merges make every word of the grammar one token."""
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
    """Token ids int64 [n, 24], as a diffusers pipeline makes them."""
    return tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt").input_ids


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained text encoder (seeded by the caller)."""
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
    ids, answers = text_examples(tokenizer)

    def loss_of(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(ids), (BATCH,), generator=generator)
        hidden = net["encoder"](ids[chosen]).last_hidden_state[:, -1]
        return layout_loss(net, hidden, answers[chosen])

    net.load_state_dict(train(net, loss_of, SCHEDULE, folder / "text.safetensors"))
    return tokenizer, encoder.eval()


def text_examples(tokenizer: CLIPTokenizer) -> tuple[Tensor, Tensor]:
    """Token ids int64 [40000, 24] of training captions, and the :func:`layout` int64 [40000, 13] of each."""
    rng = np.random.default_rng(1)
    captions = [caption(sample_scene(rng, held_out=False)) for _ in range(40_000)]
    return tokenize(tokenizer, captions), torch.tensor([layout(text) for text in captions])


def layout_heads(width: int) -> dict[str, nn.Module]:
    """Untrained linear heads that read a layout from a text state of ``width`` channels."""
    places = torch.nn.ModuleList(torch.nn.Linear(width, len(COLOURS) + 1 + len(SHAPES) + len(SIZES)) for _ in PLACES)
    return {"places": places, "background": torch.nn.Linear(width, len(BACKGROUNDS))}


def layout(text: str) -> list[int]:
    """Per place: colour (0 = empty), shape, size (-1 = nothing to ask); then the background."""
    scene = parse(text)
    by_place = {item.place: item for item in scene.objects}
    answer = []
    for place in PLACES:
        item = by_place.get(place)
        answer += (
            [0, -1, -1]
            if item is None
            else [1 + COLOURS.index(item.colour), SHAPES.index(item.shape), SIZES.index(item.size)]
        )
    return [*answer, BACKGROUNDS.index(scene.background)]


def layout_loss(net: nn.ModuleDict, hidden: Tensor, answers: Tensor) -> Tensor:
    """Cross-entropy of the heads in ``net`` on text states [n, width], summed over the questions."""
    entropy = torch.nn.functional.cross_entropy
    loss = entropy(net["background"](hidden), answers[:, -1])
    for index, head in enumerate(net["places"]):
        parts = head(hidden).split([len(COLOURS) + 1, len(SHAPES), len(SIZES)], dim=1)
        for offset, logits in enumerate(parts):
            loss = loss + entropy(logits, answers[:, 3 * index + offset], ignore_index=-1)
    return loss
