"""Random IP-Adapters of every kind, as their authors' files name the tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import UNet2DConditionModel
    from torch import Tensor

IMAGE = 20  # width of an image encoder's result
_HIDDEN = 64  # of a resampler with one head
_DEPTH = 4  # diffusers' number of a resampler's layers


def random_ip_adapter(
    unet: UNet2DConditionModel, kind: str = "plain", seed: int = 0, strength: float = 0.5
) -> dict[str, dict[str, Tensor]]:
    """``image_proj`` and ``ip_adapter`` for a UNet; ``kind`` is plain (4 tokens), plus (8 tokens) or face-id."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random) * strength

    text = unet.config.cross_attention_dim
    crossing = [module for name, module in unet.named_modules() if name.endswith(".attn2")]
    matrices = {
        f"{2 * number + 1}.to_{side}_ip.weight": normal(attention.to_q.out_features, text)
        for number, attention in enumerate(crossing)
        for side in "kv"
    }
    projections = {"plain": _plain, "plus": _plus, "face-id": _face_id}
    return {"image_proj": projections[kind](normal, text), "ip_adapter": matrices}


def image_embeds(kind: str = "plain", images: int = 1, batch: int = 2, seed: int = 9) -> Tensor:
    """Of an image encoder: [batch, images, D], of a plus kind [batch, images, 5, D]."""
    shape = (batch, images, 5, IMAGE) if kind == "plus" else (batch, images, IMAGE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _norm(name: str, width: int) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}


def _plain(normal: object, text: int) -> dict[str, Tensor]:
    assert callable(normal)
    return {"proj.weight": normal(4 * text, IMAGE), "proj.bias": normal(4 * text), **_norm("norm", text)}


def _face_id(normal: object, text: int) -> dict[str, Tensor]:
    assert callable(normal)
    return {"proj.0.weight": normal(2 * IMAGE, IMAGE), "proj.2.weight": normal(4 * text, 2 * IMAGE)} | _norm(
        "norm", text
    )


def _plus(normal: object, text: int) -> dict[str, Tensor]:
    assert callable(normal)
    tensors = {
        "latents": normal(1, 8, _HIDDEN),
        "proj_in.weight": normal(_HIDDEN, IMAGE),
        "proj_in.bias": normal(_HIDDEN),
        "proj_out.weight": normal(text, _HIDDEN),
        "proj_out.bias": normal(text),
        **_norm("norm_out", text),
    }
    for layer in (f"layers.{number}" for number in range(_DEPTH)):
        tensors |= _norm(f"{layer}.0.norm1", _HIDDEN) | _norm(f"{layer}.0.norm2", _HIDDEN)
        tensors |= _norm(f"{layer}.1.0", _HIDDEN)
        tensors |= {
            f"{layer}.0.to_q.weight": normal(_HIDDEN, _HIDDEN),
            f"{layer}.0.to_kv.weight": normal(2 * _HIDDEN, _HIDDEN),
            f"{layer}.0.to_out.weight": normal(_HIDDEN, _HIDDEN),
            f"{layer}.1.1.weight": normal(4 * _HIDDEN, _HIDDEN),
            f"{layer}.1.3.weight": normal(_HIDDEN, 4 * _HIDDEN),
        }
    return tensors


def write_ip_adapter(folder: Path, unet: UNet2DConditionModel, kind: str = "plain", seed: int = 0) -> Path:
    """A file of random weights, with a small image encoder beside it."""
    torch.manual_seed(seed)
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=IMAGE,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
            projection_dim=IMAGE,
        )
    )
    encoder.save_pretrained(folder / "image_encoder")
    parts = random_ip_adapter(unet, kind, seed)
    tensors = {f"{part}.{name}": tensor for part, own in parts.items() for name, tensor in own.items()}
    save_file(tensors, folder / "ip-adapter.safetensors")
    return folder / "ip-adapter.safetensors"
