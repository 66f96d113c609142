"""UNets of Stable Diffusion 1, 2 and XL: ``UNet2DConditionModel``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from s2p_deploy.errors import InputError
from s2p_deploy.families.model_family import (
    Block,
    Columns,
    Config,
    Shape,
    TimeConsumer,
    check_channels,
    check_sample_size,
    guidance_width,
)
from s2p_deploy.records.optional_inputs import MID_RESIDUAL, down_residual, is_residual

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

_BLOCK = re.compile(
    r"conv_in|(?:down|up)_blocks\.\d+\.(?:resnets|attentions|downsamplers|upsamplers)\.\d+"
    r"|mid_block\.(?:resnets|attentions)\.\d+"
)
_TAIL = ("conv_norm_out", "conv_act", "conv_out")
_ADDED = {"text_embeds", "time_ids"}
_UNSUPPORTED = (
    "class_embed_type",
    "num_class_embeds",
    "encoder_hid_dim_type",
    "time_embedding_act_fn",
)


def size_ids(config: Config) -> int:
    """Returns how many ids SDXL's network reads beside the pooled text.

    Original height and width, crop top and left, then target height and width, or an aesthetic score: the latter in
    refiners, whose one text encoder has states as wide as its pooled text.
    """
    pooled = config["projection_class_embeddings_input_dim"] - 5 * config["addition_time_embed_dim"]
    return 5 if pooled == _text_width(config) else 6


def _text_width(config: Config) -> int:
    width = config["cross_attention_dim"]
    return int(width if isinstance(width, int) else width[0])


class UNetFamily:
    """The family of Stable Diffusion 1, 2 and XL; see :class:`~s2p_deploy.families.model_family.ModelFamily`.

    XL's networks have ``addition_embed_type`` text_time.
    """

    component = "unet"
    distilled = re.compile(r"(?:down|up)_blocks\.\d+|mid_block")
    image_output = 0  # the others are the shortcuts to the up blocks
    flow_matching = False

    def check(self, config: Config) -> None:
        """Refuses image conditions and class labels, each by name."""
        if config.get("addition_embed_type") not in {None, "text_time"}:
            raise InputError(f"a UNet with addition_embed_type={config['addition_embed_type']!r} is not supported")
        for name in _UNSUPPORTED:
            if config.get(name) is not None:
                raise InputError(f"a UNet with {name}={config[name]!r} is not supported")
        if config.get("center_input_sample"):
            raise InputError(
                "a UNet with center_input_sample is not supported: what its first layer reads is not the sample"
            )
        check_sample_size(config, one_number=config.get("addition_embed_type") is not None)
        widths = config["cross_attention_dim"]
        if not isinstance(widths, int) and len(set(widths or ())) != 1:
            raise InputError(f"a UNet with cross_attention_dim={widths!r} is not supported: it reads one text")
        check_channels(config)

    def build(self, config: Config) -> UNet2DConditionModel:
        """Builds a UNet with untrained weights."""
        unet: UNet2DConditionModel = UNet2DConditionModel.from_config(config)
        return unet

    def text_width(self, config: Config) -> int:
        """Returns the width of cross-attention, one for all blocks."""
        return _text_width(config)

    def added_width(self, config: Config) -> int:
        """Returns the width of SDXL's pooled text and size ids, and of LCM's guidance embedding behind them."""
        if config.get("addition_embed_type") is None:
            return guidance_width(config)
        ids = size_ids(config)
        pooled = config["projection_class_embeddings_input_dim"] - ids * config["addition_time_embed_dim"]
        return int(pooled + ids + guidance_width(config))

    def embedding(self, network: nn.Module) -> nn.Module:
        """Returns the embedding of the timestep, and for SDXL of pooled text and size ids too."""
        assert isinstance(network, UNet2DConditionModel), "a network of this family"
        return _Embedding(network) if network.config.addition_embed_type is None else _AddedEmbedding(network)

    def consumers(self, network: nn.Module) -> Iterator[TimeConsumer]:
        """Yields every resnet's projection."""
        for name, module in network.named_modules():
            projection = getattr(module, "time_emb_proj", None)
            if projection is None:
                continue
            if module.time_embedding_norm != "default":
                raise InputError(
                    f"{name} uses time_embedding_norm={module.time_embedding_norm!r}: only 'default' is supported"
                )
            activation = nn.Identity() if module.skip_time_act else module.nonlinearity
            yield TimeConsumer(name, activation, projection)

    def remove_time_path(self, network: nn.Module, slices: Mapping[str, tuple[int, int]]) -> None:
        """Passes the features through the UNet's input ``timestep_cond``.

        diffusers hands that to the time embedding's MLP, so the network needs no code of its own.
        """
        assert isinstance(network, UNet2DConditionModel), "a network of this family"
        network.time_proj, network.time_embedding = nn.Identity(), _Condition()
        if network.config.addition_embed_type is not None:
            network.register_to_config(addition_embed_type=None)
            del network.add_time_proj, network.add_embedding
        for name, (start, stop) in slices.items():
            resnet = network.get_submodule(name)
            resnet.skip_time_act = True  # the features are already activated and projected
            resnet.time_emb_proj = Columns(start, stop)

    def predict(
        self, network: nn.Module, sample: Tensor, timesteps: Tensor, text: Tensor, added_cond: Tensor
    ) -> Tensor:
        """Calls a whole UNet as its pipeline does."""
        assert isinstance(network, UNet2DConditionModel), "a network of this family"
        pooled, ids, guidance = _split(added_cond, dict(network.config))
        conditions = {"text_embeds": pooled, "time_ids": ids} if pooled.shape[1] else None
        output: Tensor = network(
            sample,
            timesteps,
            text,
            timestep_cond=guidance if guidance.shape[1] else None,
            added_cond_kwargs=conditions,
            return_dict=False,
        )[0]
        return output

    def added_cond(self, conditions: Mapping[str, Any]) -> Tensor | None:
        """Joins pooled text and size ids of SDXL's ``added_cond_kwargs`` and LCM's ``timestep_cond`` to [batch, A]."""
        given = conditions.get("added_cond_kwargs") or {}
        further = sorted(set(given) - _ADDED)
        if further:
            raise InputError(f"an engine's network is fixed, it cannot take {further[0]}")
        if given and set(given) != _ADDED:
            return None
        parts = [given.get("text_embeds"), given.get("time_ids"), conditions.get("timestep_cond")]
        present = [part.float() for part in parts if part is not None]
        return torch.cat(present, 1) if present else None

    def predict_from_features(
        self, network: nn.Module, sample: Tensor, features: Tensor, text: Tensor, optional: Mapping[str, Tensor]
    ) -> Tensor:
        """Calls a UNet without time path."""
        down = tuple(value for name, value in optional.items() if is_residual(name) and name != MID_RESIDUAL)
        output: Tensor = network(
            sample,
            features[:, 0],  # must be a tensor [batch], but the removed time path was all that read it
            text,
            timestep_cond=features,
            down_block_additional_residuals=down or None,
            mid_block_additional_residual=optional.get(MID_RESIDUAL),
            return_dict=False,
        )[0]
        return output

    def residual_inputs(self, network: nn.Module) -> dict[str, Shape]:
        """Returns one input per shortcut, and that of the middle block."""
        assert isinstance(network, UNet2DConditionModel), "a network of this family"
        factor, shapes = 1, [_map(network.conv_in.out_channels, 1)]
        for block in network.down_blocks:
            shapes += [_map(resnet.out_channels, factor) for resnet in block.resnets]
            for downsampler in block.downsamplers or ():
                factor *= 2
                shapes.append(_map(downsampler.out_channels, factor))
        inputs = {down_residual(number): shape for number, shape in enumerate(shapes)}
        return inputs | {MID_RESIDUAL: shapes[-1]}

    def blocks(self, network: nn.Module) -> tuple[Block, ...]:
        """Returns the first convolution, resnets, transformers and resamplers, and the tail.

        A transformer of several layers is several blocks, because flips of rounding grow from layer to layer.
        """
        matched = ((name, module) for name, module in network.named_modules() if _BLOCK.fullmatch(name))
        blocks = (block for name, module in matched for block in _layer_blocks(name, module))
        return (*blocks, Block.chain("output", _TAIL))

    def size_multiple(self, config: Config) -> int:
        """Returns 2 per level but the last, which halve the size; other sizes would be interpolated on the way up."""
        return int(2 ** (len(config["block_out_channels"]) - 1))

    def size_limit(self, _config: Config) -> int | None:
        """Returns None: convolutions and attention take any size."""
        return None

    def split_shortcuts(self, network: nn.Module) -> dict[str, int]:
        """Returns the convolutions of up blocks that read cat(h, skip).

        h is the output of the resnet before; in the first up block that of the middle block, or without one of the last
        down block.
        """
        assert isinstance(network, UNet2DConditionModel), "a network of this family"
        below = network.mid_block if network.mid_block is not None else network.down_blocks[-1]
        channels = below.resnets[-1].conv2.out_channels
        shortcuts = {}
        for number, block in enumerate(network.up_blocks):
            for index, resnet in enumerate(block.resnets):
                path = f"up_blocks.{number}.resnets.{index}"
                shortcuts[f"{path}.conv1"] = channels
                if resnet.conv_shortcut is not None:
                    shortcuts[f"{path}.conv_shortcut"] = channels
                channels = resnet.conv2.out_channels
        return shortcuts


def _map(channels: int, factor: int) -> Shape:
    """Returns the shape of a map of features, ``factor`` latents high and wide at each of its places."""
    sides = ("height", "width") if factor == 1 else (f"height/{factor}", f"width/{factor}")
    return "batch", channels, *sides


def _layer_blocks(name: str, module: nn.Module) -> Iterator[Block]:
    layers = getattr(module, "transformer_blocks", ())
    if len(layers) < 2:
        yield Block.chain(name, (name,))
        return
    yield Block.chain(f"{name}.proj_in", (f"{name}.norm", f"{name}.proj_in"))
    for number in range(len(layers)):
        yield Block.chain(f"{name}.transformer_blocks.{number}", (f"{name}.transformer_blocks.{number}",))
    yield Block.chain(f"{name}.proj_out", (f"{name}.proj_out",))


def _split(added_cond: Tensor, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Splits ``added_cond`` [batch, A] into pooled text, size ids and guidance embedding; each may be empty."""
    ids = 0 if config.get("addition_embed_type") is None else size_ids(config)
    guidance = guidance_width(config)
    pooled, sizes, embedded = added_cond.split((added_cond.shape[1] - ids - guidance, ids, guidance), 1)
    return pooled, sizes, embedded


class _Embedding(nn.Module):
    """Maps timesteps, and LCM's guidance embedding, to the time embedding with the UNet's own layers."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.features, self.mlp, self.config = unet.time_proj, unet.time_embedding, dict(unet.config)

    def forward(self, timesteps: Tensor, added_cond: Tensor | None = None) -> Tensor:
        dtype, guidance = self.mlp.linear_1.weight.dtype, None
        if guidance_width(self.config):
            assert added_cond is not None, "this network's time features depend on it"
            guidance = _split(added_cond, self.config)[2].to(dtype)
        embedding: Tensor = self.mlp(self.features(timesteps).to(dtype), guidance)
        return embedding


class _AddedEmbedding(_Embedding):
    """Adds SDXL's embedding of pooled text and size ids."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__(unet)
        self.id_features, self.added_mlp = unet.add_time_proj, unet.add_embedding

    def forward(self, timesteps: Tensor, added_cond: Tensor | None = None) -> Tensor:
        assert added_cond is not None, "this network's time features depend on it"
        dtype = self.added_mlp.linear_1.weight.dtype
        pooled, ids, _ = _split(added_cond, self.config)
        sizes = self.id_features(ids.flatten()).view(len(ids), -1)
        added: Tensor = self.added_mlp(torch.cat([pooled.to(dtype), sizes.to(dtype)], 1))
        return super().forward(timesteps, added_cond) + added


class _Condition(nn.Module):
    """Returns the condition, which is the projected features; it replaces the time embedding's MLP."""

    def forward(self, _timesteps: Tensor, condition: Tensor) -> Tensor:
        return condition
