"""The registry of model families, by the class of the network, which every diffusers configuration names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from s2p_deploy.errors import InputError
from s2p_deploy.families.controlnet_family import ControlNetFamily, ControlNetKind, SD3ControlNetFamily
from s2p_deploy.families.mmdit import MMDiTFamily
from s2p_deploy.families.unet import UNetFamily

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from diffusers import ModelMixin

    from s2p_deploy.families.model_family import Config, ModelFamily

_CLASS = "_class_name"
_FAMILIES: dict[str, ModelFamily] = {
    "UNet2DConditionModel": UNetFamily(),
    "SD3Transformer2DModel": MMDiTFamily(),
}
_CONTROLNETS: dict[str, ControlNetKind] = {
    "ControlNetModel": ControlNetFamily(),
    "SD3ControlNetModel": SD3ControlNetFamily(),
}


def family_of(network: torch.nn.Module) -> ModelFamily:
    """Returns the family of a network.

    Raises:
        InputError: its class is not supported.
    """
    return _family(type(network).__name__)


def family_of_config(config: Mapping[str, Any]) -> ModelFamily:
    """Returns the family of a network's configuration.

    Raises:
        InputError: its class is not supported, it lacks a value, or an engine cannot compute such a network.
    """
    family = _family(str(config.get(_CLASS)))
    try:
        family.check(dict(config))
    except KeyError as error:
        raise InputError(f"the denoiser's configuration lacks {error}: save the pipeline with diffusers") from error
    return family


def controlnet_kind(config: Mapping[str, Any]) -> ControlNetKind:
    """Returns the family of a ControlNet's configuration. Raises InputError where its class is not supported."""
    name = str(config.get(_CLASS))
    if name not in _CONTROLNETS:
        raise InputError(f"{name} is not supported as a ControlNet: {' and '.join(_CONTROLNETS)} are")
    return _CONTROLNETS[name]


def network_config(network: ModelMixin) -> Config:
    """Returns the diffusers configuration of a network, JSON-ready, with its class and no other private key."""
    public = {key: value for key, value in network.config.items() if not key.startswith("_")}
    return {_CLASS: type(network).__name__} | public


def _family(name: str) -> ModelFamily:
    families = _FAMILIES | _CONTROLNETS
    if name not in families:
        raise InputError(f"a denoiser of class {name} is not supported: {' and '.join(families)} are")
    return families[name]
