"""What has to be known of a denoiser's network: the interface behind which the families differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import re
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn

    from s2p_deploy.families.blocks import Block

Config = dict[str, Any]


@dataclass(frozen=True)
class TimeConsumer:
    """A module of the network that projects the time embedding for itself: ``projection(activation(embedding))``."""

    path: str
    activation: nn.Module
    projection: nn.Linear


class NetworkKind(Protocol):
    """One kind of network. Configurations are diffusers'; paths are relative to the network.

    ``component`` names the network among a pipeline's. ``distilled`` matches the paths of modules whose outputs
    inter-layer distillation compares; where such a module gives a tuple, ``image_output`` is the place of the image's
    activation in it.
    """

    component: str
    distilled: re.Pattern[str]
    image_output: int

    def check(self, config: Config) -> None:
        """Raises InputError where the network takes something that an engine of this kind does not have."""

    def build(self, config: Config) -> nn.Module:
        """A network with untrained weights."""

    def text_width(self, config: Config) -> int:
        """D of the text states [batch, tokens, D]."""

    def added_width(self, config: Config) -> int:
        """Width of what the time features depend on besides the timestep (``added_cond``); 0 where that is nothing."""

    def embedding(self, network: nn.Module) -> nn.Module:
        """What maps timesteps float32 [n] and ``added_cond`` [n, A] to the time embedding [n, E]; shares its layers."""

    def consumers(self, network: nn.Module) -> Iterator[TimeConsumer]:
        """Every consumer of the time embedding, in module order. Raises InputError for one that is not understood."""

    def release_time_path(self, network: nn.Module, slices: Mapping[str, tuple[int, int]]) -> None:
        """Takes the time path out of ``network``: each consumer reads its columns of the projected features."""

    def answer(self, network: nn.Module, sample: Tensor, timesteps: Tensor, text: Tensor, added_cond: Tensor) -> Tensor:
        """The raw output of a whole network on ``timesteps`` float32 [batch]."""

    def added_cond(self, conditions: Mapping[str, Any]) -> Tensor | None:
        """``added_cond`` [batch, A] of what a pipeline passes its denoiser by keyword; None where that has none.

        Raises InputError where what it passes there holds more.
        """

    def denoise(self, network: nn.Module, sample: Tensor, features: Tensor, text: Tensor) -> Tensor:
        """The raw output of a network without time path, for projected features [batch, P]."""

    def blocks(self, network: nn.Module) -> tuple[Block, ...]:
        """The parts that parity is asked of one by one; the last is what comes behind all blocks (``output``)."""

    def size_multiple(self, config: Config) -> int:
        """What height and width of the latents must be multiples of."""

    def size_limit(self, config: Config) -> int | None:
        """The largest height and width of the latents; None where nothing limits them."""

    def split_shortcuts(self, network: nn.Module) -> dict[str, int]:
        """Convolutions over cat(h, skip), and the number of channels of h."""
