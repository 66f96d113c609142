"""Seeded weights for the metrics that need some, at the real networks' full size: only what they learnt is missing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from s2p_deploy.metric_networks import CLIP, INCEPTION, LPIPS, SUMS, InceptionFeatures, Lpips

_SMALL = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
_WORDS = ["<|startoftext|>", "<|endoftext|>", "!", "!</w>"]


def seeded(network: torch.nn.Module) -> torch.nn.Module:
    """Weights that keep the size of what passes, and statistics away from 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.dim() == 4:
            fan = tensor[0].numel()
            tensor.data.normal_(0, (2 / fan) ** 0.5, generator=generator)
        elif tensor.is_floating_point():
            tensor.data.uniform_(
                *((0.8, 1.2) if name.endswith(("weight", "var")) else (-0.1, 0.1)), generator=generator
            )
    for name, tensor in network.named_parameters():
        if name.startswith("lin"):
            tensor.data.abs_()
    return network.eval()


def write_weights(folder: Path, *names: str) -> Path:
    """A folder of weights with the networks of ``names``, pinned."""
    folder.mkdir(parents=True)
    if INCEPTION in names:
        classes = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
        save_file(seeded(InceptionFeatures()).state_dict() | classes, folder / INCEPTION)
    if LPIPS in names:
        save_file(seeded(Lpips()).state_dict(), folder / LPIPS)
    if CLIP in names:
        _write_clip(folder / CLIP)
    return pin(folder)


def pin(folder: Path) -> Path:
    """Writes the list that ``sha256sum`` would."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}\n" for path in files]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")
    return folder


def _write_clip(folder: Path) -> None:
    folder.mkdir()
    letters = [chr(code) + end for code in range(97, 123) for end in ("", "</w>")]
    words = {word: index for index, word in enumerate([*_WORDS, *letters])}
    (folder / "vocab.json").write_text(json.dumps(words), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    text = _SMALL | {"vocab_size": len(words), "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}
    vision = _SMALL | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(folder)
