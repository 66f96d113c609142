"""Sites and blocks of a hot denoiser, found by watching one forward pass: what reads which tensor is never guessed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from s2p_deploy.families.hot_denoiser import HotDenoiser

_BLOCK = re.compile(
    r"^(conv_in|(?:down|up)_blocks\.\d+\.(?:resnets|attentions|downsamplers|upsamplers)\.\d+|mid_block\.(?:resnets|attentions)\.\d+)$"
)


@dataclass(frozen=True)
class Site:
    """A Conv or Linear with weights.

    Sites with the same ``tensor`` number read the very same tensor; ``reads_text`` marks those that read only the text
    (no dependence on the timestep).
    """

    name: str
    op: Literal["conv", "linear"]
    tensor: int
    reads_text: bool


def discover_sites(denoiser: HotDenoiser, tokens: int = 2) -> tuple[Site, ...]:
    """Every site in the order in which a forward pass reaches it."""
    unet = denoiser.unet
    weight = unet.conv_in.weight
    sample = torch.zeros(
        1,
        unet.config.in_channels,
        unet.config.sample_size,
        unet.config.sample_size,
        dtype=weight.dtype,
        device=weight.device,
    )
    text = torch.zeros(1, tokens, unet.config.cross_attention_dim, dtype=weight.dtype, device=weight.device)
    read: list[tuple[str, torch.nn.Module, Tensor]] = []  # holds the tensors alive, so that identities stay unique
    hooks = [
        module.register_forward_pre_hook(lambda module, args, name=name: read.append((name, module, args[0])))
        for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)
    ]
    try:
        with torch.no_grad():
            denoiser(sample, torch.zeros(1, dtype=torch.int64, device=weight.device), text)
    finally:
        for hook in hooks:
            hook.remove()
    numbers: dict[int, int] = {}
    return tuple(
        Site(
            name,
            "conv" if isinstance(module, torch.nn.Conv2d) else "linear",
            numbers.setdefault(id(tensor), len(numbers)),
            tensor is text,
        )
        for name, module, tensor in read
    )


def block_names(denoiser: HotDenoiser) -> tuple[str, ...]:
    """Module paths of the blocks with one activation in and one out: conv_in, resnets, transformers, resamplers."""
    return tuple(name for name, _ in denoiser.unet.named_modules() if _BLOCK.match(name))
