"""The sensitive and insensitive layers that S2P (arXiv 2412.06661) lists for SD1.4 and SDXL, and those two denoisers.

In the patterns, ``{a,b}`` stands for either and ``tb`` for transformer_blocks.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from s2p_deploy.families import IndexedDenoiser, indexed_denoiser
from s2p_deploy.records import TimeTable

SD14 = {
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
SDXL = {  # without the embedding of sizes and pooled text, which the time table replaces
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
}

_SD14_SENSITIVE = """
up_blocks.3.attentions.{0,1,2}.proj_in
up_blocks.3.attentions.{1,2}.proj_out
up_blocks.3.attentions.{0,1,2}.tb.0.attn1.to_out.0
up_blocks.3.attentions.{1,2}.tb.0.attn1.to_v
up_blocks.3.resnets.{1,2}.conv_shortcut
down_blocks.0.attentions.0.proj_in
"""
_SD14_INSENSITIVE = """
down_blocks.3.resnets.{0,1}.conv{1,2}
mid_block.resnets.{0,1}.conv{1,2}
up_blocks.0.resnets.0.conv1
mid_block.attentions.0.tb.0.attn{1,2}.to_{q,k}
"""
_SDXL_SENSITIVE = """
up_blocks.1.attentions.{0,1,2}.proj_{in,out}
up_blocks.1.attentions.{0,1,2}.tb.{0,1}.attn1.{to_v,to_out.0}
up_blocks.1.attentions.1.tb.1.attn1.to_{q,k}
up_blocks.1.attentions.1.tb.{0,1}.ff.net.{0.proj,2}
up_blocks.1.attentions.0.tb.0.ff.net.2
up_blocks.{1,2}.resnets.{0,1,2}.conv_shortcut
down_blocks.1.resnets.0.conv_shortcut
up_blocks.2.resnets.{0,1,2}.conv2
up_blocks.2.resnets.1.conv1
down_blocks.0.resnets.{0,1}.conv2
down_blocks.1.attentions.0.proj_in
"""
_SDXL_INSENSITIVE = """
mid_block.attentions.0.tb.{4,5,6,7}.attn2.to_{q,k}
down_blocks.2.attentions.0.tb.{6,7,8,9}.attn2.to_{q,k}
down_blocks.2.attentions.0.tb.5.attn2.to_k
down_blocks.2.attentions.1.tb.9.attn2.to_{q,k}
up_blocks.0.attentions.0.tb.{7,8,9}.attn2.to_{q,k}
up_blocks.0.attentions.1.tb.{8,9}.attn2.to_{q,k}
up_blocks.0.attentions.2.tb.{5,6,7,8,9}.attn2.to_{q,k}
"""


def expanded(pattern: str) -> list[str]:
    """``conv{1,2}`` gives conv1 and conv2; several braces give all combinations."""
    found = re.search(r"\{([^}]*)\}", pattern)
    if found is None:
        return [pattern]
    start, end = pattern[: found.start()], pattern[found.end() :]
    return [name for choice in found[1].split(",") for name in expanded(start + choice + end)]


def _names(patterns: str) -> tuple[str, ...]:
    lines = patterns.replace(".tb.", ".transformer_blocks.").split()
    return tuple(name for line in lines for name in expanded(line))


SD14_SENSITIVE, SD14_INSENSITIVE = _names(_SD14_SENSITIVE), _names(_SD14_INSENSITIVE)
SDXL_SENSITIVE, SDXL_INSENSITIVE = _names(_SDXL_SENSITIVE), _names(_SDXL_INSENSITIVE)


def meta_denoiser(config: dict[str, Any]) -> IndexedDenoiser:
    """A denoiser of full size without data: shapes and names only. Its time table has one row."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config).eval()
    slices, start = {}, 0
    for name, module in unet.named_modules():
        if isinstance(getattr(module, "time_emb_proj", None), torch.nn.Linear):
            slices[name] = (start, start := start + module.time_emb_proj.out_features)
    return indexed_denoiser(unet, TimeTable(np.zeros((1, start), np.float32), slices)).to("meta")
