"""The interface behind which the families of networks differ, and the records that it speaks in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import nn

from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    import re
    from collections.abc import Iterator, Mapping

    from torch import Tensor

Config = dict[str, Any]
Shape = tuple[int | str, ...]  # of names for open sizes


def check_sample_size(config: Config, *, one_number: bool) -> None:
    """Checks that a network says how large the latents are that it draws.

    Raises:
        InputError: ``sample_size`` is neither a number nor, where ``one_number`` is false, height and width.
    """
    size = config["sample_size"]
    sizes = list(size) if isinstance(size, list | tuple) and len(size) == 2 and not one_number else [size]
    if not all(type(side) is int and side > 0 for side in sizes):
        forms = "a number" if one_number else "a number, or height and width"
        raise InputError(f"the denoiser's config.json has sample_size={size!r}: set it to {forms} of the latents")


def latent_channels(config: Config) -> int:
    """Returns the channels of the latents that a network denoises, which are those that it writes."""
    return int(config.get("out_channels") or config["in_channels"])


def reads_mask(config: Config) -> bool:
    """Tells inpainting networks, which read a mask and the latents of the masked picture behind their latents."""
    return bool(config["in_channels"] != latent_channels(config))


def check_channels(config: Config) -> None:
    """Checks that a network reads its latents, for inpainting with a mask and the latents of the masked picture.

    Raises:
        InputError: it reads other channels.
    """
    latents = config["out_channels"] or config["in_channels"]
    if config["in_channels"] not in {latents, 2 * latents + 1}:
        raise InputError(
            f"a denoiser that reads {config['in_channels']} channels and writes {latents} is not supported: one reads"
            f" its latents of {latents}, or for inpainting {2 * latents + 1} with a mask and the masked picture's"
        )


def guidance_width(config: Config) -> int:
    """Returns W of the embedding [batch, W] that a network reads its guidance from (LCM), 0 of others."""
    return int(config.get("time_cond_proj_dim") or 0)


def has_branches(config: Config, guidance_scale: float) -> bool:
    """Tells whether a pipeline predicts with the prompt and without: not up to 1, nor where guidance is embedded."""
    return guidance_scale > 1 and not guidance_width(config)


@dataclass(frozen=True)
class Tap:
    """A place where an activation can be observed: the input or the output of a module."""

    module: str
    side: Literal["input", "output"]


@dataclass(frozen=True)
class Block:
    """A part of a network whose parity is checked by itself, and the taps where its activations enter and leave.

    Paths are relative to the network.
    """

    name: str
    modules: tuple[str, ...]
    entering: tuple[Tap, ...]
    leaving: tuple[Tap, ...]

    @staticmethod
    def chain(name: str, modules: tuple[str, ...]) -> Block:
        """Makes a block of modules in a row: one activation enters the first, one leaves the last."""
        return Block(name, modules, (Tap(modules[0], "input"),), (Tap(modules[-1], "output"),))


@dataclass(frozen=True)
class TimeConsumer:
    """A module of the network that projects the time embedding for itself: ``projection(activation(embedding))``."""

    path: str
    activation: nn.Module
    projection: nn.Linear


class Columns(nn.Module):
    """A module that slices one consumer's features from all; it replaces the consumer's projection."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, features: Tensor) -> Tensor:
        """Slices [batch, P] to [batch, stop - start]."""
        return features[:, self.start : self.stop]


class ModelFamily(Protocol):
    """A family of networks. Configurations are diffusers'; paths are relative to the network.

    Attributes:
        component: name of the network among a pipeline's components.
        distilled: matches the paths of modules whose outputs inter-layer distillation compares.
        image_output: index of the image's activation in the output of such a module, where that is a tuple.
        flow_matching: whether its pipelines draw with schedulers of flow matching alone.
    """

    component: str
    distilled: re.Pattern[str]
    image_output: int
    flow_matching: bool

    def check(self, config: Config) -> None:
        """Checks that an engine can compute such a network.

        Raises:
            InputError: it has an input or a layer that engines of this family do not have.
        """

    def build(self, config: Config) -> nn.Module:
        """Builds a network with untrained weights."""

    def text_width(self, config: Config) -> int:
        """Returns D of the text states [batch, tokens, D]."""

    def added_width(self, config: Config) -> int:
        """Returns A of ``added_cond`` [batch, A], which the time features depend on besides the timestep, or 0."""

    def embedding(self, network: nn.Module) -> nn.Module:
        """Returns a module that maps timesteps float32 [n] and ``added_cond`` [n, A] to the time embedding [n, E].

        It shares the network's layers.
        """

    def consumers(self, network: nn.Module) -> Iterator[TimeConsumer]:
        """Yields every consumer of the time embedding, in module order.

        Raises:
            InputError: a consumer is of an unknown kind.
        """

    def remove_time_path(self, network: nn.Module, slices: Mapping[str, tuple[int, int]]) -> None:
        """Removes the time path from ``network``: each consumer reads its columns of the projected features."""

    def predict(
        self, network: nn.Module, sample: Tensor, timesteps: Tensor, text: Tensor, added_cond: Tensor
    ) -> Tensor:
        """Predicts [batch, C, H, W] with a whole network, for ``timesteps`` float32 [batch]."""

    def predict_from_features(
        self, network: nn.Module, sample: Tensor, features: Tensor, text: Tensor, optional: Mapping[str, Tensor]
    ) -> Tensor:
        """Predicts [batch, C, H, W] with a network without time path, for projected features [batch, P].

        ``optional`` are the inputs of adapters by name, or none.
        """

    def residual_inputs(self, network: nn.Module) -> dict[str, Shape]:
        """Returns the inputs that take a ControlNet's residuals by name, and their shapes, in the order of its outputs.

        Open sizes are ``batch`` and fractions of ``height`` and ``width`` of the latents.
        """

    def added_cond(self, conditions: Mapping[str, Any]) -> Tensor | None:
        """Returns ``added_cond`` [batch, A] from a pipeline's keyword arguments, or None where they have none.

        Raises:
            InputError: the arguments hold further conditions.
        """

    def blocks(self, network: nn.Module) -> tuple[Block, ...]:
        """Returns the blocks whose parity is checked one by one; the last, ``output``, follows all others."""

    def size_multiple(self, config: Config) -> int:
        """Returns the number that height and width of the latents must be multiples of."""

    def size_limit(self, config: Config) -> int | None:
        """Returns the largest height and width of the latents; None where nothing limits them."""

    def split_shortcuts(self, network: nn.Module) -> dict[str, int]:
        """Returns the convolutions over cat(h, skip) by path, with the number of channels of h."""
