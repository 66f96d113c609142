"""Shifts: the middle of every input channel's range, which a layer's input loses before it is quantized.

A symmetric grid over values from -0.28 upwards, as a SiLU leaves them, does not use half of its codes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from s2p_deploy.calib.samples import samples_at
from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from s2p_deploy.context import Progress
    from s2p_deploy.families import IndexedDenoiser
    from s2p_deploy.records import LatentDataset


def middle(low: Tensor, high: Tensor) -> Tensor:
    """Computes the middle of ranges, float32, as a number that half precision holds exactly: graphs may store it so."""
    return ((low + high) / 2).half().float()


@torch.no_grad()
def input_ranges(
    denoiser: IndexedDenoiser,
    paths: Sequence[str],
    dataset: LatentDataset,
    latents: int,
    progress: Progress,
    samples_per_call: int | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Finds the smallest and largest value of every channel of the inputs of modules, float32 [in] each, on the CPU.

    Over up to ``latents`` samples of each timestep, both CFG branches, in calls of ``samples_per_call`` (None: of a
    few).

    Raises:
        InputError: an activation holds NaN or infinity.
    """
    lows: dict[str, Tensor] = {}
    highs: dict[str, Tensor] = {}

    def observe(path: str, x: Tensor) -> None:
        channels = x.transpose(0, 1).flatten(1) if x.dim() == 4 else x.flatten(0, -2).T
        low, high = channels.amin(1), channels.amax(1)
        lows[path] = torch.minimum(low, lows.get(path, low))
        highs[path] = torch.maximum(high, highs.get(path, high))

    hooks = [
        denoiser.network.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: observe(path, args[0])
        )
        for path in paths
    ]
    first = [
        np.flatnonzero(dataset.timestep_indices == index)[:latents] for index in np.unique(dataset.timestep_indices)
    ]
    pairs, done = samples_at(dataset, np.concatenate(first)), 0
    try:
        for which in pairs.batches(samples_per_call):
            denoiser(*(argument.to(denoiser.device) for argument in pairs.inputs(which)))
            done += len(which)
            progress("ranges", done, len(pairs.sample))
    finally:
        for hook in hooks:
            hook.remove()
    ranges = {path: (lows[path].cpu(), highs[path].cpu()) for path in paths}
    for path, (low, high) in ranges.items():
        if not (torch.isfinite(low) & torch.isfinite(high)).all():
            raise InputError(
                f"the activation {path} is not finite, though every weight is: the scheduler's configuration does not"
                " suit the network"
            )
    return ranges
