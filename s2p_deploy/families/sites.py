"""Sites and blocks of a hot denoiser, found by watching one forward pass: what reads which tensor is never guessed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

import torch

from s2p_deploy.families.transforms import LowRankLinear, SmoothedLinear

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from s2p_deploy.families.hot_denoiser import HotDenoiser
    from s2p_deploy.families.network_kind import Config


@dataclass(frozen=True)
class Site:
    """A Conv or Linear with weights.

    Sites with the same ``tensor`` number read the very same tensor. ``reads`` marks those that read the latents
    (``sample``) or only the text, without dependence on the timestep; a forward pass ends with the ``last``.
    A ``branch`` is a half of a low-rank branch and stays in floating point always.
    """

    name: str
    op: Literal["conv", "linear"]
    tensor: int
    reads: Literal["sample", "text", "activation"] = "activation"
    last: bool = False
    branch: bool = False


@dataclass(frozen=True)
class _Reading:
    """A module that ran, and its input, held alive so that identities stay unique."""

    name: str
    module: torch.nn.Module
    tensor: Tensor


@dataclass(frozen=True)
class DenoiserInputs:
    """Arguments of a hot denoiser, as :meth:`HotDenoiser.forward` takes them."""

    sample: Tensor
    step_index: Tensor
    encoder_hidden_states: Tensor
    added_cond: Tensor

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In order."""
        return self.sample, self.step_index, self.encoder_hidden_states, self.added_cond


def zero_inputs(denoiser: HotDenoiser, *, tokens: int, batch: int = 1) -> DenoiserInputs:
    """Inputs of the right shapes, on the denoiser's device and in its dtype, all zero."""
    like = next(denoiser.network.parameters())
    return DenoiserInputs(
        like.new_zeros(batch, *latent_shape(denoiser)),
        torch.zeros(batch, dtype=torch.int64, device=like.device),
        like.new_zeros(batch, tokens, denoiser.kind.text_width(denoiser.config)),
        like.new_zeros(batch, denoiser.added_width),
    )


def latent_shape(denoiser: HotDenoiser) -> tuple[int, int, int]:
    """(C, H, W) of the latents that the denoiser was trained on."""
    return latent_shape_of(denoiser.config)


def latent_shape_of(config: Config) -> tuple[int, int, int]:
    """The same from a network's configuration."""
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return config["in_channels"], height, width


def discover_sites(denoiser: HotDenoiser, tokens: int = 2) -> tuple[Site, ...]:
    """Every site in the order in which a forward pass reaches it."""
    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    rewritten = (SmoothedLinear, LowRankLinear)  # watched too: what reads the text there hands on a function of it
    modules = dict(denoiser.network.named_modules())
    watched = [name for name, module in modules.items() if isinstance(module, kinds + rewritten)]
    given = zero_inputs(denoiser, tokens=tokens)
    readings = _watch(denoiser, watched, given)
    sources: dict[int, Literal["sample", "text"]] = {
        id(given.sample): "sample",
        id(given.encoder_hidden_states): "text",
    }
    named = {reading.name: sources[id(reading.tensor)] for reading in readings if id(reading.tensor) in sources}
    low_rank = [name for name, module in modules.items() if isinstance(module, LowRankLinear)]
    branches = {f"{name}.{half}" for name in low_rank for half in ("down", "up")}
    found = [reading for reading in readings if isinstance(reading.module, kinds)]
    numbers: dict[int, int] = {}
    return tuple(
        Site(
            reading.name,
            "conv" if isinstance(reading.module, torch.nn.Conv2d) else "linear",
            numbers.setdefault(id(reading.tensor), len(numbers)),
            reads=_source(reading.name, named),
            last=reading is found[-1],
            branch=reading.name in branches,
        )
        for reading in found
    )


def readers_by_tensor(denoiser: HotDenoiser, names: Sequence[str], tokens: int = 2) -> tuple[tuple[str, ...], ...]:
    """The modules ``names`` in groups that read the very same tensor."""
    groups: dict[int, list[str]] = {}
    readings = _watch(denoiser, names, zero_inputs(denoiser, tokens=tokens))
    for reading in readings:
        groups.setdefault(id(reading.tensor), []).append(reading.name)
    return tuple(tuple(group) for group in groups.values())


def _watch(denoiser: HotDenoiser, names: Sequence[str], given: DenoiserInputs) -> list[_Reading]:
    """What the modules ``names`` read in one forward pass, in its order."""
    readings: list[_Reading] = []
    hooks = [
        denoiser.network.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: readings.append(_Reading(name, module, args[0]))
        )
        for name in names
    ]
    try:
        with torch.no_grad():
            denoiser(*given.arguments())
    finally:
        for hook in hooks:
            hook.remove()
    return readings


def _source(path: str, named: dict[str, Literal["sample", "text"]]) -> Literal["sample", "text", "activation"]:
    """What a module or one of its parents reads."""
    found = [named[part] for part in _path_and_parents(path) if part in named]
    return found[0] if found else "activation"


def _path_and_parents(path: str) -> set[str]:
    """``a.b.c`` gives a, a.b and a.b.c."""
    return set(accumulate(path.split("."), lambda parent, leaf: f"{parent}.{leaf}"))
