"""Which kind of network a denoiser is: decided by its class, which every diffusers configuration names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from s2p_deploy.errors import InputError
from s2p_deploy.families.mmdit import MMDiTKind
from s2p_deploy.families.unet import UNetKind

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from diffusers import ModelMixin

    from s2p_deploy.families.network_kind import Config, NetworkKind

_CLASS = "_class_name"
_KINDS: dict[str, NetworkKind] = {"UNet2DConditionModel": UNetKind(), "SD3Transformer2DModel": MMDiTKind()}


def kind_of(network: torch.nn.Module) -> NetworkKind:
    """The kind of a network. Raises InputError for a network of another class."""
    return _kind(type(network).__name__)


def kind_of_config(config: Mapping[str, Any]) -> NetworkKind:
    """The kind that a network's configuration is of.

    Raises:
        InputError: it is of no supported class, lacks a value, or asks for something that an engine does not have.
    """
    kind = _kind(str(config.get(_CLASS)))
    try:
        kind.check(dict(config))
    except KeyError as error:
        raise InputError(f"the denoiser's configuration lacks {error}: save the pipeline with diffusers") from error
    return kind


def network_config(network: ModelMixin) -> Config:
    """The diffusers configuration of a network, JSON-ready, with its class and no other private key."""
    public = {key: value for key, value in network.config.items() if not key.startswith("_")}
    return {_CLASS: type(network).__name__} | public


def _kind(name: str) -> NetworkKind:
    if name not in _KINDS:
        raise InputError(f"a denoiser of class {name} is not supported: {' and '.join(_KINDS)} are")
    return _KINDS[name]
