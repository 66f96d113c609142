"""LoRAs in the weights of networks in memory, for as long as something is computed with them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from s2p_deploy.families.lora import WEIGHT, fused_weight, network_weights

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from diffusers import DiffusionPipeline

    from s2p_deploy.families.lora import Lora, LoraLayer, Weights


def loadable_networks(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """Returns the networks of a pipeline that LoRAs are for, by component: the denoiser and the text encoders."""
    networks = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {name: part for name, part in networks.items() if name in {"unet", "transformer"} or "text_encoder" in name}


def weights_in_memory(networks: Mapping[str, torch.nn.Module]) -> Weights:
    """Finds the shapes of weights that a low-rank product can be added to, by component and path of their layer."""
    return {name: network_weights(network) for name, network in networks.items()}


@contextmanager
def fused(networks: Mapping[str, torch.nn.Module], loras: Sequence[tuple[Lora, float]]) -> Iterator[None]:
    """Has LoRAs, each with its own weight, in the weights of networks while the context lasts.

    The networks' own weights come back as they were, bit by bit, also where something fails inside. LoRAs of components
    that ``networks`` lacks are passed over. One thread at a time may use the networks.
    """
    changes: dict[tuple[str, str], list[tuple[Lora, LoraLayer, float]]] = {}
    for lora, weight in loras:
        for layer in lora.layers:
            if layer.component in networks:
                changes.setdefault((layer.component, layer.path), []).append((lora, layer, weight))
    own: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
    try:
        with torch.no_grad():
            for (component, path), members in changes.items():
                parameter = networks[component].get_parameter(f"{path}{WEIGHT}")
                own.append((parameter, parameter.data))
                added = ((lora.read(layer), weight) for lora, layer, weight in members)
                made = fused_weight(parameter.data.cpu(), added)
                parameter.data = made.to(parameter.device, parameter.dtype)
        yield
    finally:
        for parameter, data in own:
            parameter.data = data
