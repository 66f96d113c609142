"""A pipeline of Stable Diffusion v1-4's size with random weights: what the other full_size scripts measure with."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from s2p_deploy.families import resolve_base

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SD_V1 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}  # the rest are diffusers' defaults


def write_pipeline(folder: Path, unet: Mapping[str, Any] = SD_V1) -> None:
    """The bundled pipeline with a UNet of that configuration (SD v1-4's own) and a text encoder of SD v1-4's width."""
    left_out = shutil.ignore_patterns("unet", "text_encoder", "classifier*")
    shutil.copytree(resolve_base("shapes").folder, folder, ignore=left_out)
    tokens = json.loads((folder / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=768, intermediate_size=3072, num_hidden_layers=2, num_attention_heads=12
    )
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    UNet2DConditionModel(**unet).save_pretrained(folder / "unet")


def gigabytes(folder: Path) -> float:
    """Size of all files in a folder."""
    return round(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e9, 2)
