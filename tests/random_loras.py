"""LoRAs with random matrices, in every layout that trainers write, for tests of what they change."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from s2p_deploy.families.checkpoint import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from torch import Tensor

    from s2p_deploy.families import BasePipeline


@dataclass(frozen=True)
class RandomLayer:
    """The change of one layer, as it was drawn."""

    component: str
    path: str
    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.down)


def weight_of(base: BasePipeline, component: str, path: str) -> Tensor:
    stem = "model" if component.startswith("text_encoder") else "diffusion_pytorch_model"
    return Checkpoint(base.folder / component, stem).read(f"{path}.weight").float()


def random_layers(
    base: BasePipeline, paths: Mapping[str, Iterable[str]], *, rank: int = 4, dora: bool = False, seed: int = 0
) -> list[RandomLayer]:
    """Changes of the layers by component, each a fifth as large as the weight; alphas that differ from the rank."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for component, names in paths.items():
        for number, path in enumerate(names):
            weight = weight_of(base, component, path)
            down = torch.randn(rank, *weight.shape[1:], generator=generator)
            up = torch.randn(len(weight), rank, *[1] * (weight.dim() - 2), generator=generator)
            alpha = float(rank) / (1 + number % 2)
            product = (up.flatten(1) @ down.flatten(1)) * alpha / rank
            up *= 0.2 * weight.norm() / product.norm()
            magnitude = None
            if dora:
                magnitude = weight.flatten(1).norm(dim=1) * (1 + 0.1 * torch.rand(len(weight), generator=generator))
            layers.append(RandomLayer(component, path, down, up, alpha, magnitude))
    return layers


def in_peft(layers: Iterable[RandomLayer], *, text_model: bool = True) -> dict[str, Tensor]:
    """``unet.….lora_A.weight``. The layout has no alphas, so they go into the matrices."""
    named = {}
    for layer in layers:
        path = layer.path
        if text_model and layer.component.startswith("text_encoder"):
            path = "text_model." + path.removeprefix("text_model.")
        name = f"{layer.component}.{path}"
        named[f"{name}.lora_A.weight"] = layer.down
        named[f"{name}.lora_B.weight"] = layer.up * (layer.alpha / layer.rank)
        if layer.magnitude is not None:
            shape = (-1,) if layer.down.dim() == 2 else (1, -1, 1, 1)
            named[f"{name}.lora_magnitude_vector"] = layer.magnitude.view(shape)
    return named


def in_kohya(layers: Iterable[RandomLayer], names: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """``lora_unet_….lora_down.weight`` with ``.alpha``; ``names`` gives other names of the UNet's paths."""
    named = {}
    several = any(layer.component == "text_encoder_2" for layer in layers)
    prefixes = {"text_encoder": "lora_te1_" if several else "lora_te_", "text_encoder_2": "lora_te2_"}
    for layer in layers:
        path = layer.path
        if layer.component in prefixes:
            path = "text_model." + path.removeprefix("text_model.") if "projection" not in path else path
        path = (names or {}).get(path, path)
        name = prefixes.get(layer.component, "lora_unet_") + path.replace(".", "_")
        named[f"{name}.lora_down.weight"] = layer.down
        named[f"{name}.lora_up.weight"] = layer.up
        named[f"{name}.alpha"] = torch.tensor(layer.alpha)
        if layer.magnitude is not None:
            named[f"{name}.dora_scale"] = layer.magnitude.view(-1, *[1] * (layer.down.dim() - 1))
    return named


def in_old_diffusers(layers: Iterable[RandomLayer], *, processors: bool = False) -> dict[str, Tensor]:
    """``….lora.down.weight``, or with ``processors`` the names of attention processors; without alphas."""
    named = {}
    for layer in layers:
        path, infix = layer.path, ".lora"
        if processors:
            path = re.sub(r"\.(attn\d|self_attn)\.", r".\1.processor.", path)
            path, infix = re.sub(r"\.to_out\.0$", ".to_out", path), "_lora"
        if layer.component.startswith("text_encoder"):
            path = "text_model." + layer.path.removeprefix("text_model.")
            if processors:
                path = re.sub(r"\.(q|k|v|out)_proj$", r".to_\1", path)
            else:
                infix = ".lora_linear_layer"
        named[f"{layer.component}.{path}{infix}.down.weight"] = layer.down
        named[f"{layer.component}.{path}{infix}.up.weight"] = layer.up * (layer.alpha / layer.rank)
    return named


def write_lora(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, dict(metadata or {}))
    return file
