"""ControlNets of UNets as a family of networks: calibrated, exported and built by the stages of denoisers.

Its network is a ``ControlNetModel`` without the small network that embeds the control picture, which is the same in all
steps. It reads latents and that embedding side by side, ``sample`` [batch, C + E, H, W], and writes its residuals as
one map [batch, K, H, W]: those of smaller maps are spread over its places (pixel shuffle).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from diffusers import ControlNetModel
from torch import nn

from s2p_deploy.errors import InputError
from s2p_deploy.families.model_family import Block, Config, Shape, check_sample_size
from s2p_deploy.families.unet import UNetFamily, layer_blocks, shortcut_maps

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

SIZE = "sample_size"  # of the latents; no part of diffusers' own configuration of a ControlNet


class ControlNetFamily(UNetFamily):
    """The family of ControlNets; see :class:`~s2p_deploy.families.model_family.ModelFamily`."""

    component = "controlnet"

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
        return without_embedding(ControlNetModel.from_config(own), config[SIZE])

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
        return joined_residuals((*down, middle), [factor for _, factor in _maps(network)])

    def residual_inputs(self, _network: nn.Module) -> dict[str, Shape]:
        """Returns nothing: a ControlNet takes no residuals."""
        return {}

    def blocks(self, network: nn.Module) -> tuple[Block, ...]:
        """Returns the first convolution, resnets, transformers and downsamplers."""
        return layer_blocks(network)

    def split_shortcuts(self, _network: nn.Module) -> dict[str, int]:
        """Returns nothing: the way down joins no maps."""
        return {}


def without_embedding(network: ControlNetModel, sample_size: int | Sequence[int]) -> ControlNetModel:
    """Takes the embedding of the control picture out of a ControlNet (in place), and notes the size of the latents."""
    network.controlnet_cond_embedding = nn.Identity()
    network.register_to_config(**{SIZE: sample_size})
    return network


def residual_maps(config: Config) -> list[tuple[int, int]]:
    """Returns the channels of every residual of a ControlNet, and the latents on a side of each of its places."""
    with torch.device("meta"):
        return _maps(ControlNetFamily().build(config))


def _maps(network: nn.Module) -> list[tuple[int, int]]:
    maps = shortcut_maps(network)
    return [*maps, maps[-1]]


def joined_residuals(residuals: Sequence[Tensor], factors: Sequence[int]) -> Tensor:
    """Joins residuals [batch, c, H / f, W / f] to one map [batch, K, H, W]."""
    pairs = zip(residuals, factors, strict=True)
    return torch.cat([nn.functional.pixel_shuffle(each, f) if f > 1 else each for each, f in pairs], 1)


def divided_residuals(joined: Tensor, maps: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Divides what :func:`joined_residuals` joined, of residuals of such channels and factors."""
    parts = joined.split([channels // factor**2 for channels, factor in maps], 1)
    return [nn.functional.pixel_unshuffle(part, factor) for part, (_, factor) in zip(parts, maps, strict=True)]
