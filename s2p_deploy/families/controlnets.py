"""ControlNets of diffusers: loaded from a folder, checked against a pipeline, and put into stock pipelines with it."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers import ControlNetModel, SD3ControlNetModel

from s2p_deploy.errors import InputError
from s2p_deploy.families.model_family import latent_channels
from s2p_deploy.families.network_files import load_network, read_json
from s2p_deploy.families.registry import controlnet_kind, family_of_config, network_config

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from diffusers import DiffusionPipeline, ModelMixin

    from s2p_deploy.families.model_family import Config

_CLASSES: dict[str, type[ModelMixin]] = {"ControlNetModel": ControlNetModel, "SD3ControlNetModel": SD3ControlNetModel}


def load_controlnet(
    folder: Path, denoiser_config: Config, pixels_per_latent: int, dtype: torch.dtype | None = None
) -> ModelMixin:
    """Loads a ControlNet on the CPU, for pipelines whose denoiser has a configuration.

    Args:
        folder: in diffusers format; only safetensors are read.
        denoiser_config: of the network that takes its residuals.
        pixels_per_latent: pixels on a side of a picture for one latent.
        dtype: of its weights; None is float32.

    Raises:
        InputError: there is none, its files are not whole, or it is for another kind of network.
    """
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise InputError(f"{folder} is no ControlNet: give a folder in diffusers format, with config.json")
    config = read_json(config_file)
    kind = _CLASSES.get(str(config.get("_class_name")))
    if kind is None:
        raise InputError(
            f"{folder} holds a {config.get('_class_name')}: {' and '.join(_CLASSES)} are supported as ControlNets"
        )
    network: ModelMixin = load_network(folder, kind, dtype or torch.float32)
    own = network_config(network)
    if isinstance(network, SD3ControlNetModel) and not (own["use_pos_embed"] and own["joint_attention_dim"]):
        raise InputError(f"{folder} takes its positions from the transformer's weights, which an engine has not")
    maps = controlnet_kind(own).residual_maps(network)
    check_fits(folder, own, maps, denoiser_config, pixels_per_latent)
    return network.eval().requires_grad_(requires_grad=False)


def residual_maps(config: Config) -> list[tuple[int, int]]:
    """Returns the channels of every residual of a ControlNet, and the latents on a side of each of its places."""
    kind = controlnet_kind(config)
    with torch.device("meta"):
        return kind.residual_maps(kind.build(config))


def check_fits(
    folder: Path, own: Config, maps: Sequence[tuple[int, int]], config: Config, pixels_per_latent: int
) -> None:
    """Checks that a ControlNet gives the residuals that a denoiser takes, and reads what its pipeline gives.

    Args:
        folder: of the ControlNet, for errors.
        own: its configuration.
        maps: the channels of its residuals, and the latents on a side of each of their places.
        config: of the denoiser.
        pixels_per_latent: pixels on a side of a picture for one latent.

    Raises:
        InputError: it does not fit.
    """
    family = family_of_config(config)
    with torch.device("meta"):
        shapes = list(family.residual_inputs(family.build(config)).values())
    compared: list[tuple[str, Any, Any]] = [("channels of latents", own["in_channels"], latent_channels(config))]
    if family.component == "unet":
        halved = len(own.get("conditioning_embedding_out_channels") or ()) - 1
        compared += [
            ("channels of residuals", [channels for channels, _ in maps], [shape[1] for shape in shapes]),
            ("pixels per latent", 2**halved, pixels_per_latent),
        ]
    else:
        compared += [
            ("channels of residuals", {channels for channels, _ in maps}, {shape[-1] for shape in shapes}),
            ("latents per patch", own.get("patch_size"), config["patch_size"]),
        ]
    text = own.get("joint_attention_dim") or own.get("cross_attention_dim")
    compared.append(("numbers per token", text, family.text_width(config)))
    for what, given, taken in compared:
        if given != taken:
            raise InputError(f"{folder} is a ControlNet of {given} {what}, this pipeline's network has {taken}")


def with_controlnets(
    pipe: DiffusionPipeline, controlnets: Sequence[ModelMixin], task: Literal["", "Img2Img", "Inpaint"] = ""
) -> DiffusionPipeline:
    """Makes the stock pipeline of a pipeline's family that takes ControlNets; it shares all but the scheduler.

    ``task`` is empty where it draws from noise, ``Img2Img`` or ``Inpaint``.

    Raises:
        InputError: diffusers has no such pipeline for this family.
    """
    import diffusers

    family = type(pipe).__name__.removesuffix("Pipeline").removesuffix("Inpaint").removesuffix("Img2Img")
    kind = getattr(diffusers, f"{family}ControlNet{task}Pipeline", None)
    if kind is None:
        raise InputError(
            f"diffusers has no ControlNet pipeline like {type(pipe).__name__} that starts from a picture: leave that or"
            " the ControlNet out"
        )
    taken = inspect.signature(kind.__init__).parameters
    given = pipe.components | {name: value for name, value in pipe.config.items() if name not in pipe.components}
    given |= {
        "scheduler": type(pipe.scheduler).from_config(pipe.scheduler.config),
        "controlnet": controlnets[0] if len(controlnets) == 1 else list(controlnets),
    }
    other: DiffusionPipeline = kind(**{name: value for name, value in given.items() if name in taken})
    other.set_progress_bar_config(disable=True)
    return other
