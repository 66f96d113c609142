"""Multimodal diffusion transformers of Stable Diffusion 3: ``SD3Transformer2DModel``."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING, Any

from diffusers import SD3Transformer2DModel
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, SD35AdaLayerNormZeroX
from torch import nn

from s2p_deploy.families.model_family import (
    Block,
    Columns,
    Config,
    Shape,
    Tap,
    TimeConsumer,
    check_channels,
    check_sample_size,
)
from s2p_deploy.records.optional_inputs import block_residual, is_residual

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

_MODULATED = (AdaLayerNormZero, AdaLayerNormContinuous, SD35AdaLayerNormZeroX)


class MMDiTFamily:
    """The family of Stable Diffusion 3; see :class:`~s2p_deploy.families.model_family.ModelFamily`.

    The consumers are the AdaLN modulations, a third of the weights. Besides the timestep they depend on the pooled
    text.
    """

    component = "transformer"
    distilled = re.compile(r"transformer_blocks\.\d+")
    image_output = 1  # 0 is the text's activation
    flow_matching = True

    def check(self, config: Config) -> None:
        """Refuses a network that reads other channels than its latents', or for inpainting a mask and a picture's."""
        check_sample_size(config, one_number=True)
        check_channels(config)

    def build(self, config: Config) -> SD3Transformer2DModel:
        """Builds a transformer with untrained weights."""
        transformer: SD3Transformer2DModel = SD3Transformer2DModel.from_config(config)
        return transformer

    def sample_channels(self, config: Config) -> int:
        """Returns the channels of the latents, and for inpainting of a mask and a picture's latents."""
        return int(config["in_channels"])

    def text_width(self, config: Config) -> int:
        """Returns the width of the joint text states."""
        return int(config["joint_attention_dim"])

    def added_width(self, config: Config) -> int:
        """Returns the width of the pooled text."""
        return int(config["pooled_projection_dim"])

    def embedding(self, network: nn.Module) -> nn.Module:
        """Returns the network's own embedding of timestep and pooled text."""
        embedding: nn.Module = network.get_submodule("time_text_embed")
        return embedding

    def consumers(self, network: nn.Module) -> Iterator[TimeConsumer]:
        """Yields every modulated norm."""
        for name, module in network.named_modules():
            if isinstance(module, _MODULATED):
                yield TimeConsumer(name, module.silu, module.linear)

    def remove_time_path(self, network: nn.Module, slices: Mapping[str, tuple[int, int]]) -> None:
        """Passes the features through the transformer's input ``timestep``."""
        network.register_module("time_text_embed", _Timestep())
        for name, (start, stop) in slices.items():
            norm = network.get_submodule(name)
            norm.silu, norm.linear = nn.Identity(), Columns(start, stop)

    def predict(
        self, network: nn.Module, sample: Tensor, timesteps: Tensor, text: Tensor, added_cond: Tensor
    ) -> Tensor:
        """Calls a whole transformer as its pipeline does."""
        output: Tensor = network(sample, text, added_cond, timesteps, return_dict=False)[0]
        return output

    def added_cond(self, conditions: Mapping[str, Any]) -> Tensor | None:
        """Returns the pooled text [batch, A] of a pipeline's ``pooled_projections``."""
        pooled: Tensor | None = conditions.get("pooled_projections")
        return pooled

    def predict_from_features(
        self, network: nn.Module, sample: Tensor, features: Tensor, text: Tensor, optional: Mapping[str, Tensor]
    ) -> Tensor:
        """Calls a transformer without time path."""
        residuals = [value.flatten(1, 2) for name, value in optional.items() if is_residual(name)]
        # diffusers counts the last block in, behind which nothing is added
        given = [*residuals, residuals[-1]] if residuals else None
        # the pooled text's argument cannot be left out, but the removed time path was all that read it
        output: Tensor = network(
            sample, text, features, features, block_controlnet_hidden_states=given, return_dict=False
        )[0]
        return output

    def residual_inputs(self, network: nn.Module) -> dict[str, Shape]:
        """Returns one input per block but the last, behind which diffusers adds nothing: [batch, rows, columns, D]."""
        assert isinstance(network, SD3Transformer2DModel), "a network of this family"
        patch = network.config.patch_size
        shape = ("batch", f"height/{patch}", f"width/{patch}", network.inner_dim)
        return {block_residual(number): shape for number in range(len(network.transformer_blocks) - 1)}

    def blocks(self, network: nn.Module) -> tuple[Block, ...]:
        """Returns the patch embedding, the joint blocks and the tail.

        Image and text enter a joint block at the inputs of its first norms, and leave it at those of the next block's.
        """
        names = [name for name, _ in network.named_modules() if self.distilled.fullmatch(name)]
        joint = joint_blocks(names, (_norm("norm_out"),))
        return (Block.chain("pos_embed", ("pos_embed",)), *joint, Block.chain("output", ("norm_out", "proj_out")))

    def size_multiple(self, config: Config) -> int:
        """Returns two patches: ONNX's division would round the middle of the cropped position table differently."""
        return 2 * int(config["patch_size"])

    def size_limit(self, config: Config) -> int | None:
        """Returns the size of the table that positions are cropped from."""
        return int(config["patch_size"] * config["pos_embed_max_size"])

    def split_shortcuts(self, _network: nn.Module) -> dict[str, int]:
        """Returns nothing: a transformer has no shortcuts."""
        return {}


def joint_blocks(names: Sequence[str], end: tuple[Tap, ...]) -> list[Block]:
    """Makes the joint blocks of these names, in their order; the last is left at ``end``."""
    borders = [(_norm(f"{name}.norm1"), _norm(f"{name}.norm1_context")) for name in names] + [end]
    return [Block(name, (name,), *border) for name, border in zip(names, itertools.pairwise(borders), strict=True)]


def _norm(path: str) -> Tap:
    return Tap(f"{path}.norm", "input")


class _Timestep(nn.Module):
    """Returns its first argument, the projected features passed as the timestep; it replaces the embedding."""

    def forward(self, features: Tensor, _pooled: Tensor) -> Tensor:
        return features
