"""Sites and blocks of a hot denoiser, found by watching one forward pass: what reads which tensor is never guessed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

import torch

from s2p_deploy.families.transforms import LowRankLinear, SmoothedLinear

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from s2p_deploy.families.hot_denoiser import HotDenoiser

_BLOCK = re.compile(
    r"^(conv_in|(?:down|up)_blocks\.\d+\.(?:resnets|attentions|downsamplers|upsamplers)\.\d+|mid_block\.(?:resnets|attentions)\.\d+)$"
)


@dataclass(frozen=True)
class Site:
    """A Conv or Linear with weights.

    Sites with the same ``tensor`` number read the very same tensor; ``reads_text`` marks those that read only the text
    (no dependence on the timestep). A ``branch`` is a half of a low-rank branch and stays in floating point always.
    """

    name: str
    op: Literal["conv", "linear"]
    tensor: int
    reads_text: bool
    branch: bool = False


@dataclass(frozen=True)
class _Reading:
    """A module that ran, and its input, held alive so that identities stay unique."""

    name: str
    module: torch.nn.Module
    tensor: Tensor


def discover_sites(denoiser: HotDenoiser, tokens: int = 2) -> tuple[Site, ...]:
    """Every site in the order in which a forward pass reaches it."""
    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    rewritten = (SmoothedLinear, LowRankLinear)  # watched too: what reads the text there hands on a function of it
    modules = dict(denoiser.unet.named_modules())
    watched = [name for name, module in modules.items() if isinstance(module, kinds + rewritten)]
    readings, text = _watch(denoiser, watched, tokens)
    textual = {reading.name for reading in readings if reading.tensor is text}
    low_rank = [name for name, module in modules.items() if isinstance(module, LowRankLinear)]
    branches = {f"{name}.{half}" for name in low_rank for half in ("down", "up")}
    numbers: dict[int, int] = {}
    return tuple(
        Site(
            reading.name,
            "conv" if isinstance(reading.module, torch.nn.Conv2d) else "linear",
            numbers.setdefault(id(reading.tensor), len(numbers)),
            reads_text=not textual.isdisjoint(_path_and_parents(reading.name)),
            branch=reading.name in branches,
        )
        for reading in readings
        if isinstance(reading.module, kinds)
    )


def readers_by_tensor(denoiser: HotDenoiser, names: Sequence[str], tokens: int = 2) -> tuple[tuple[str, ...], ...]:
    """The modules ``names`` in groups that read the very same tensor."""
    readings, _ = _watch(denoiser, names, tokens)
    groups: dict[int, list[str]] = {}
    for reading in readings:
        groups.setdefault(id(reading.tensor), []).append(reading.name)
    return tuple(tuple(group) for group in groups.values())


def block_names(denoiser: HotDenoiser) -> tuple[str, ...]:
    """Module paths of the blocks with one activation in and one out: conv_in, resnets, transformers, resamplers."""
    return tuple(name for name, _ in denoiser.unet.named_modules() if _BLOCK.match(name))


def _watch(denoiser: HotDenoiser, names: Sequence[str], tokens: int) -> tuple[list[_Reading], Tensor]:
    """What the modules ``names`` read in one forward pass, in its order, and the text that it was given."""
    unet = denoiser.unet
    weight = unet.conv_in.weight
    size = unet.config.sample_size
    sample = torch.zeros(1, unet.config.in_channels, size, size, dtype=weight.dtype, device=weight.device)
    text = torch.zeros(1, tokens, unet.config.cross_attention_dim, dtype=weight.dtype, device=weight.device)
    readings: list[_Reading] = []
    hooks = [
        unet.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: readings.append(_Reading(name, module, args[0]))
        )
        for name in names
    ]
    try:
        with torch.no_grad():
            denoiser(sample, torch.zeros(1, dtype=torch.int64, device=weight.device), text)
    finally:
        for hook in hooks:
            hook.remove()
    return readings, text


def _path_and_parents(path: str) -> set[str]:
    """``a.b.c`` gives a, a.b and a.b.c."""
    return set(accumulate(path.split("."), lambda parent, leaf: f"{parent}.{leaf}"))
