"""ControlNets as families of networks: calibrated, exported and built by the stages of denoisers.

Their network is diffusers' own without what embeds the control picture, which is the same in all steps. It reads
latents and that embedding side by side, ``sample`` [batch, C + E, H, W], and writes its residuals as one map
[batch, K, H, W]: those of smaller maps, and SD3's tokens, are spread over its places (pixel shuffle).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from diffusers import ControlNetModel, SD3ControlNetModel
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from diffusers.models.normalization import AdaLayerNormContinuous
from torch import nn

from s2p_deploy.errors import InputError
from s2p_deploy.families.mmdit import MMDiTFamily, joint_blocks
from s2p_deploy.families.model_family import Block, Config, ModelFamily, Shape, Tap, check_sample_size
from s2p_deploy.families.unet import UNetFamily, layer_blocks, shortcut_maps

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from diffusers import ModelMixin
    from diffusers.models.attention import JointTransformerBlock
    from torch import Tensor

SIZE = "sample_size"  # of the latents; no part of diffusers' own configuration of a ControlNet


class ControlNetKind(ModelFamily, Protocol):
    """A family of ControlNets.

    Attributes:
        edges: patterns of the layers that read the latents, and of those that write the residuals.
        picture: the keyword of a stock pipeline for control pictures.
    """

    edges: tuple[str, ...]
    picture: str

    def embedding_of(self, network: nn.Module) -> nn.Module:
        """Returns the module that embeds control pictures, of a whole network."""

    def build_embedding(self, config: Config) -> nn.Module:
        """Builds that module with untrained weights."""

    def spread(self, embedded: Tensor, config: Config) -> Tensor:
        """Spreads what that module gives over the places of the latents, [batch, E, H, W]."""

    def without_embedding(self, network: ModelMixin, sample_size: int | Sequence[int]) -> ModelMixin:
        """Takes the module out of a network (in place), which then has a ``sample_size`` of latents."""

    def residual_maps(self, network: nn.Module) -> list[tuple[int, int]]:
        """Lists the channels of every residual, and the latents on a side of each of its places."""


class ControlNetFamily(UNetFamily):
    """The family of UNets' ControlNets; see :class:`ControlNetKind`."""

    component = "controlnet"
    edges: tuple[str, ...] = ("conv_in", "controlnet_down_blocks.*", "controlnet_mid_block")
    picture = "image"

    def check(self, config: Config) -> None:
        """Refuses class labels, texts of several kinds, and channels that cannot be spread over places."""
        for name in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type"):
            if config.get(name) is not None:
                raise InputError(f"a ControlNet with {name}={config[name]!r} is not supported")
        if config.get("addition_embed_type") not in {None, "text_time"}:
            raise InputError(
                f"a ControlNet with addition_embed_type={config['addition_embed_type']!r} is not supported"
            )
        check_sample_size(config, one_number=False)
        for level, channels in enumerate(config["block_out_channels"]):
            if channels % 4**level:
                raise InputError(f"a ControlNet with {channels} channels at level {level} is not supported")

    def build(self, config: Config) -> ControlNetModel:
        """Builds a ControlNet with untrained weights, without its embedding of the control picture."""
        own = {name: value for name, value in config.items() if name != SIZE}
        return self.without_embedding(ControlNetModel.from_config(own), config[SIZE])

    def embedding_of(self, network: nn.Module) -> nn.Module:
        """Returns the convolutions over a control picture."""
        return network.get_submodule("controlnet_cond_embedding")

    def build_embedding(self, config: Config) -> nn.Module:
        """Builds the convolutions over a control picture."""
        embedding: nn.Module = ControlNetConditioningEmbedding(
            config["block_out_channels"][0],
            config["conditioning_channels"],
            tuple(config["conditioning_embedding_out_channels"]),
        )
        return embedding

    def spread(self, embedded: Tensor, config: Config) -> Tensor:
        """Returns the embedding: it has the latents' places."""
        del config
        return embedded

    def without_embedding(self, network: ModelMixin, sample_size: int | Sequence[int]) -> ControlNetModel:
        """Takes the embedding out, and notes the size of the latents, which the configuration has not."""
        network.controlnet_cond_embedding = nn.Identity()
        network.register_to_config(**{SIZE: sample_size})
        return network

    def residual_maps(self, network: nn.Module) -> list[tuple[int, int]]:
        """Lists those of the way down, and of the middle block."""
        maps = shortcut_maps(network)
        return [*maps, maps[-1]]

    def sample_channels(self, config: Config) -> int:
        """Returns the channels of latents and embedding."""
        return int(config["in_channels"] + config["block_out_channels"][0])

    def predict_from_features(
        self, network: nn.Module, sample: Tensor, features: Tensor, text: Tensor, optional: Mapping[str, Tensor]
    ) -> Tensor:
        """Calls a ControlNet without time path; returns its residuals as one map."""
        del optional
        assert isinstance(network, ControlNetModel), "a network of this family"
        latents = network.config.in_channels
        down, middle = network(
            sample[:, :latents],
            features[:, 0],
            text,
            controlnet_cond=sample[:, latents:],
            timestep_cond=features,
            return_dict=False,
        )
        return joined_residuals((*down, middle), [factor for _, factor in self.residual_maps(network)])

    def residual_inputs(self, _network: nn.Module) -> dict[str, Shape]:
        """Returns nothing: a ControlNet takes no residuals."""
        return {}

    def blocks(self, network: nn.Module) -> tuple[Block, ...]:
        """Returns the first convolution, resnets, transformers and downsamplers."""
        return layer_blocks(network)

    def split_shortcuts(self, _network: nn.Module) -> dict[str, int]:
        """Returns nothing: the way down joins no maps."""
        return {}


class SD3ControlNetFamily(MMDiTFamily):
    """The family of SD3's ControlNets; see :class:`ControlNetKind`."""

    component = "controlnet"
    edges: tuple[str, ...] = ("pos_embed.proj", "controlnet_blocks.*")
    picture = "control_image"

    def build(self, config: Config) -> SD3ControlNetModel:
        """Builds a ControlNet with untrained weights, without its embedding of the control latents."""
        return self.without_embedding(SD3ControlNetModel.from_config(config), config[SIZE])

    def sample_channels(self, config: Config) -> int:
        """Returns the channels of latents and embedding."""
        width = config["num_attention_heads"] * config["attention_head_dim"]
        return int(config["in_channels"] + width // config["patch_size"] ** 2)

    def embedding_of(self, network: nn.Module) -> nn.Module:
        """Returns the convolution over the latents of a control picture."""
        return network.get_submodule("pos_embed_input.proj")

    def build_embedding(self, config: Config) -> nn.Module:
        """Builds the convolution over the latents of a control picture."""
        patch, width = config["patch_size"], config["num_attention_heads"] * config["attention_head_dim"]
        return nn.Conv2d(config["in_channels"] + (config["extra_conditioning_channels"] or 0), width, patch, patch)

    def spread(self, embedded: Tensor, config: Config) -> Tensor:
        """Spreads the numbers of a patch [batch, D, H / p, W / p] over its latents."""
        return nn.functional.pixel_shuffle(embedded, config["patch_size"])

    def without_embedding(self, network: ModelMixin, sample_size: int | Sequence[int]) -> SD3ControlNetModel:
        """Takes the embedding out, and what the last block does to the text, which nothing reads."""
        del sample_size
        network.pos_embed_input = nn.Identity()
        _end_text(network.transformer_blocks[-1])
        return network

    def predict_from_features(
        self, network: nn.Module, sample: Tensor, features: Tensor, text: Tensor, optional: Mapping[str, Tensor]
    ) -> Tensor:
        """Calls a ControlNet without time path; returns its residuals as one map."""
        del optional
        assert isinstance(network, SD3ControlNetModel), "a network of this family"
        latents, patch = network.config.in_channels, network.config.patch_size
        control = nn.functional.pixel_unshuffle(sample[:, latents:], patch)
        (blocks,) = network(
            hidden_states=sample[:, :latents],
            controlnet_cond=control.flatten(2).transpose(1, 2),
            encoder_hidden_states=text,
            pooled_projections=features,
            timestep=features,
            return_dict=False,
        )
        maps = [tokens.transpose(1, 2).reshape(control.shape) for tokens in blocks]
        return joined_residuals(maps, [patch] * len(maps))

    def residual_inputs(self, _network: nn.Module) -> dict[str, Shape]:
        """Returns nothing: a ControlNet takes no residuals."""
        return {}

    def residual_maps(self, network: nn.Module) -> list[tuple[int, int]]:
        """Lists one of each block: a token has as many latents as a patch."""
        assert isinstance(network, SD3ControlNetModel), "a network of this family"
        return [(network.inner_dim, network.config.patch_size)] * len(network.transformer_blocks)

    def blocks(self, network: nn.Module) -> tuple[Block, ...]:
        """Returns the patch embedding, the joint blocks, and the layers that write the residuals."""
        names = [name for name, _ in network.named_modules() if self.distilled.fullmatch(name)]
        outputs = [f"controlnet_blocks.{number}" for number in range(len(names))]
        return (
            Block.chain("pos_embed", ("pos_embed",)),
            *joint_blocks(names, (Tap(outputs[-1], "input"),)),
            *(Block.chain(name, (name,)) for name in outputs),
        )


def _end_text(block: JointTransformerBlock) -> None:
    """Makes a joint block (in place) one that the text does not leave, as a transformer's last block is."""
    norm = block.norm1_context
    rows = norm.linear.weight.chunk(6), norm.linear.bias.chunk(6)
    shift, scale = 0, 1  # of the six that an AdaLayerNormZero has; an AdaLayerNormContinuous has the scale first
    ended = AdaLayerNormContinuous(
        norm.linear.in_features, norm.linear.in_features, elementwise_affine=False, eps=norm.norm.eps
    )
    with torch.no_grad():
        ended.linear.weight.copy_(torch.cat([rows[0][scale], rows[0][shift]]))
        ended.linear.bias.copy_(torch.cat([rows[1][scale], rows[1][shift]]))
    block.norm1_context = ended.to(norm.linear.weight)
    block.context_pre_only = block.attn.context_pre_only = True
    block.attn.to_add_out = block.norm2_context = block.ff_context = None


def joined_residuals(residuals: Sequence[Tensor], factors: Sequence[int]) -> Tensor:
    """Joins residuals [batch, c, H / f, W / f] to one map [batch, K, H, W]."""
    pairs = zip(residuals, factors, strict=True)
    return torch.cat([nn.functional.pixel_shuffle(each, f) if f > 1 else each for each, f in pairs], 1)


def divided_residuals(joined: Tensor, maps: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Divides what :func:`joined_residuals` joined, of residuals of such channels and factors."""
    parts = joined.split([channels // factor**2 for channels, factor in maps], 1)
    return [nn.functional.pixel_unshuffle(part, factor) for part, (_, factor) in zip(parts, maps, strict=True)]
