"""Networks of a pipeline besides its denoiser: text encoders and the two halves of the autoencoder, for export."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from torch import nn

from s2p_deploy.errors import InputError
from s2p_deploy.families.network_files import component_classes, load_network, read_config, read_index
from s2p_deploy.families.registry import network_config

if TYPE_CHECKING:
    from collections.abc import Mapping

    from s2p_deploy.families.pipelines import BasePipeline

STATES, LAYERS, POOLED = "last_hidden_state", "hidden_states", "pooled"
ENCODER, DECODER = "vae_encoder", "vae_decoder"
AUTOENCODER = "vae"
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_CLIP = ("CLIPTextModel", "CLIPTextModelWithProjection")
_T5 = "T5EncoderModel"
_AUTOENCODERS = ("AutoencoderKL",)
_EXAMPLE_TOKENS = 8


@dataclass(frozen=True)
class ComponentNetwork:
    """A network in evaluation mode with what tracing it needs.

    Attributes:
        network: takes one tensor, gives a tensor or a tuple of them.
        example: an input.
        input: name of the input.
        outputs: names of the outputs.
        open_sizes: dimensions of ``example`` that may have other sizes, as ``torch.export.Dim`` by dimension.
        config: configuration of the whole component.
    """

    network: nn.Module
    example: torch.Tensor
    input: str
    outputs: tuple[str, ...]
    open_sizes: Mapping[int, Any]
    config: dict[str, Any]


def component_networks(base: BasePipeline) -> tuple[str, ...]:
    """Lists a pipeline's networks that :func:`load_component` loads: text encoders and the autoencoder's halves."""
    index = read_index(base.folder)
    present = tuple(name for name in _TEXT_ENCODERS if index.get(name, [None, None])[1] is not None)
    return (*present, DECODER, ENCODER)


def component_of(network: str) -> str:
    """Returns the name of the pipeline's component that a network belongs to."""
    return AUTOENCODER if network in {DECODER, ENCODER} else network


def load_component(base: BasePipeline, name: str, dtype: torch.dtype = torch.float32) -> ComponentNetwork:
    """Loads one of :func:`component_networks` on the CPU.

    In float16 the exceptions are those of a diffusers pipeline: T5 keeps the products that overflow in float32, and so
    does, as a whole, an autoencoder whose configuration asks for it (SDXL's ``force_upcast``).

    Raises:
        InputError: its class is not supported, or it cannot be loaded.
    """
    component = component_of(name)
    kinds = component_classes(base.folder)
    if component not in kinds:
        raise InputError(f"{base.folder} has no {component}")
    network_class: Any = kinds[component]
    class_name = network_class.__name__
    known = _AUTOENCODERS if component == AUTOENCODER else (*_CLIP, _T5)
    if class_name not in known:
        raise InputError(
            f"{component} of {base.base.source} is a {class_name}, which cannot be exported: {', '.join(known)} can"
        )
    if component == AUTOENCODER and _upcasts(base):
        dtype = torch.float32
    network = load_network(base.folder / component, network_class, dtype)
    if component != AUTOENCODER:
        return _text_encoder(network)
    return _encoder(network) if name == ENCODER else _decoder(network)


def _upcasts(base: BasePipeline) -> bool:
    """Tells whether the pipeline runs its autoencoder in float32 where everything else is in float16."""
    config = read_config(base.folder / AUTOENCODER, diffusers.AutoencoderKL)
    # every autoencoder has force_upcast; pipelines that follow it have this method
    return bool(config.get("force_upcast")) and hasattr(getattr(diffusers, base.pipeline_class), "upcast_vae")


def _text_encoder(network: Any) -> ComponentNetwork:  # noqa: ANN401 - transformers is not typed
    # CLIP takes as many tokens as it has positions; T5's number of tokens is open
    clip = hasattr(network.config, "max_position_embeddings")
    tokens = network.config.max_position_embeddings if clip else _EXAMPLE_TOKENS
    sizes = {0: torch.export.Dim("batch")} | ({} if clip else {1: torch.export.Dim("tokens", min=2)})
    return ComponentNetwork(
        _ClipStates(network) if clip else _T5States(network),
        torch.zeros(2, tokens, dtype=torch.int64),
        "input_ids",
        (STATES, LAYERS, POOLED) if clip else (STATES,),
        sizes,
        json.loads(network.config.to_json_string(use_diff=False)),
    )


def _decoder(autoencoder: Any) -> ComponentNetwork:  # noqa: ANN401 - diffusers is not typed
    config = network_config(autoencoder)
    example = torch.zeros(2, config["latent_channels"], 6, 8, dtype=autoencoder.dtype)
    return ComponentNetwork(_Decoder(autoencoder), example, "latents", ("image",), _open(1), config)


def _encoder(autoencoder: Any) -> ComponentNetwork:  # noqa: ANN401 - diffusers is not typed
    config = network_config(autoencoder)
    factor = pixels_per_latent(config)
    example = torch.zeros(2, config["in_channels"], 6 * factor, 8 * factor, dtype=autoencoder.dtype)
    return ComponentNetwork(_Encoder(autoencoder), example, "image", ("moments",), _open(factor), config)


def pixels_per_latent(config: Mapping[str, Any]) -> int:
    """Returns how many pixels a side of a latent stands for, of an autoencoder's configuration."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


def _open(factor: int) -> dict[int, Any]:
    """Opens the batch, and height and width to multiples of ``factor``."""
    batch, height, width = (torch.export.Dim(name) for name in ("batch", "height", "width"))
    return {0: batch, 2: factor * height, 3: factor * width}


class _Wrapped(nn.Module):
    network: Any  # transformers and diffusers are not typed

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.eval()


class _ClipStates(_Wrapped):
    """Maps tokens int64 [batch, tokens] to last states, states of every layer [layers + 1, ...], and pooled ones."""

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        output = self.network(ids, position_ids=positions, output_hidden_states=True)
        pooled = output.text_embeds if "text_embeds" in output else output.pooler_output
        return output.last_hidden_state, torch.stack(output.hidden_states), pooled


class _T5States(_Wrapped):
    """Maps tokens int64 [batch, tokens] to the last states; no pipeline reads the other layers', which are large."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.network(ids).last_hidden_state
        return states


class _Decoder(_Wrapped):
    """Maps latents [batch, C, H, W] to pictures [batch, 3, factor * H, factor * W]."""

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        picture: torch.Tensor = self.network.decode(latents, return_dict=False)[0]
        return picture


class _Encoder(_Wrapped):
    """Maps pictures to mean and log variance of their latents, [batch, 2 C, H, W]."""

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        moments: torch.Tensor = self.network.encode(picture).latent_dist.parameters
        return moments
