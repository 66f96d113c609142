"""What a dataset will take: points, denoiser calls, room on the disk, time."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from s2p_deploy.families import latent_shape, zero_inputs

if TYPE_CHECKING:
    from s2p_deploy.families import HotDenoiser
    from s2p_deploy.records import PromptSet

_LONG = 5.0  # seconds of a call after which its first one is measure enough


@dataclass(frozen=True)
class Estimate:
    """What one process has left to do: ``points`` of ``bytes`` in all, for ``calls`` of the denoiser."""

    points: int
    bytes: int
    calls: int
    samples: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.points} points, {self.bytes / 1e6:.3g} MB on disk;"
            f" {self.calls} denoiser calls of {self.samples} samples, about {_duration(self.seconds)}"
        )


def point_bytes(teacher: HotDenoiser) -> int:
    """Bytes of one stored point: input and both answers in float16, row and prompt in int64."""
    channels, height, width = latent_shape(teacher)
    return 3 * 2 * channels * height * width + 2 * 8


def text_bytes(prompts: PromptSet, teacher: HotDenoiser, tokens: int) -> int:
    """Bytes of the texts: the distinct ones in float32, each prompt's two places among them in int64."""
    texts = len({prompt.text for prompt in prompts.prompts}) + len({prompt.negative for prompt in prompts.prompts})
    each = tokens * teacher.kind.text_width(teacher.config) + teacher.added_width
    return 4 * texts * each + 2 * 8 * len(prompts.prompts)


@torch.no_grad()
def seconds_per_call(teacher: HotDenoiser, width: int, tokens: int) -> float:
    """Measured seconds of a call with 2 * ``width`` samples, on the teacher's device."""
    inputs = zero_inputs(teacher, tokens=tokens, batch=2 * width).arguments()

    def timed() -> float:
        started = time.perf_counter()
        teacher(*inputs).cpu()  # the copy waits for the device
        return time.perf_counter() - started

    first = timed()
    return first if first > _LONG else min(timed(), timed())


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
