"""Multimodal diffusion transformers of Stable Diffusion 3: ``SD3Transformer2DModel``."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING, Any

from diffusers import SD3Transformer2DModel
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, SD35AdaLayerNormZeroX
from torch import nn

from s2p_deploy.errors import InputError
from s2p_deploy.families.blocks import Block, Tap, chain_block
from s2p_deploy.families.network_kind import Config, TimeConsumer
from s2p_deploy.families.time_features import Columns

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

_MODULATED = (AdaLayerNormZero, AdaLayerNormContinuous, SD35AdaLayerNormZeroX)


class MMDiTKind:
    """See :class:`~s2p_deploy.families.network_kind.NetworkKind`.

    The consumers are the AdaLN modulations, a third of the weights; what they depend on besides the timestep is the
    pooled text.
    """

    component = "transformer"
    distilled = re.compile(r"transformer_blocks\.\d+")
    image_output = 1  # the first is the text's

    def check(self, config: Config) -> None:
        """Refuses a network that writes other channels than it reads."""
        if config["in_channels"] != (config["out_channels"] or config["in_channels"]):
            raise InputError(
                f"a transformer that reads {config['in_channels']} channels and writes {config['out_channels']}"
                " (inpainting) is not supported: give the text-to-image model"
            )

    def build(self, config: Config) -> SD3Transformer2DModel:
        """Of the configuration."""
        transformer: SD3Transformer2DModel = SD3Transformer2DModel.from_config(config)
        return transformer

    def text_width(self, config: Config) -> int:
        """The width of the joint text states."""
        return int(config["joint_attention_dim"])

    def added_width(self, config: Config) -> int:
        """The pooled text."""
        return int(config["pooled_projection_dim"])

    def embedding(self, network: nn.Module) -> nn.Module:
        """Of timestep and pooled text."""
        embedding: nn.Module = network.get_submodule("time_text_embed")
        return embedding

    def consumers(self, network: nn.Module) -> Iterator[TimeConsumer]:
        """Every modulated norm."""
        for name, module in network.named_modules():
            if isinstance(module, _MODULATED):
                yield TimeConsumer(name, module.silu, module.linear)

    def release_time_path(self, network: nn.Module, slices: Mapping[str, tuple[int, int]]) -> None:
        """The features come in where the transformer takes its timestep."""
        network.register_module("time_text_embed", _Timestep())
        for name, (start, stop) in slices.items():
            norm = network.get_submodule(name)
            norm.silu, norm.linear = nn.Identity(), Columns(start, stop)

    def answer(self, network: nn.Module, sample: Tensor, timesteps: Tensor, text: Tensor, added_cond: Tensor) -> Tensor:
        """As a pipeline asks it."""
        output: Tensor = network(sample, text, added_cond, timesteps, return_dict=False)[0]
        return output

    def added_cond(self, conditions: Mapping[str, Any]) -> Tensor | None:
        """The pooled text."""
        pooled: Tensor | None = conditions.get("pooled_projections")
        return pooled

    def denoise(self, network: nn.Module, sample: Tensor, features: Tensor, text: Tensor) -> Tensor:
        """What stands where the pooled text stood is not read."""
        output: Tensor = network(sample, text, features, features, return_dict=False)[0]
        return output

    def blocks(self, network: nn.Module) -> tuple[Block, ...]:
        """The patches, the joint blocks and the tail.

        Image and text enter a joint block where its first norms read them, and leave it where those of the next do.
        """
        names = [name for name, _ in network.named_modules() if self.distilled.fullmatch(name)]
        borders = [(_norm(f"{name}.norm1"), _norm(f"{name}.norm1_context")) for name in names] + [(_norm("norm_out"),)]
        joint = [Block(name, (name,), *border) for name, border in zip(names, itertools.pairwise(borders), strict=True)]
        return (chain_block("pos_embed", ("pos_embed",)), *joint, chain_block("output", ("norm_out", "proj_out")))

    def size_multiple(self, config: Config) -> int:
        """Two patches: positions are cropped from the middle of their table, which ONNX's division rounds otherwise."""
        return 2 * int(config["patch_size"])

    def size_limit(self, config: Config) -> int | None:
        """What the table of positions is cropped from."""
        return int(config["patch_size"] * config["pos_embed_max_size"])

    def split_shortcuts(self, _network: nn.Module) -> dict[str, int]:
        """A transformer has none."""
        return {}


def _norm(path: str) -> Tap:
    return Tap(f"{path}.norm", "input")


class _Timestep(nn.Module):
    """Stands where the embedding was: hands on what comes as the timestep, which is the projected features."""

    def forward(self, features: Tensor, _pooled: Tensor) -> Tensor:
        return features
