"""The transforms that a recipe asks for: which layers they take, and their values from stored latents and weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from s2p_deploy.calib.dataset.stored_points import points_at
from s2p_deploy.errors import InputError, S2PError
from s2p_deploy.families import LowRankLinear, SmoothedLinear, module_of_kind, readers_by_tensor
from s2p_deploy.records import TransformSpec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from s2p_deploy.families import HotDenoiser
    from s2p_deploy.progress import Progress
    from s2p_deploy.recipe import Transforms
    from s2p_deploy.records import LatentDataset

_FLOOR = 1e-5  # smallest peak of a channel, as a share of its tensor's: silent channels get no extreme factor


def transform_spec(hot: HotDenoiser, transforms: Transforms, linears: Sequence[str]) -> TransformSpec:
    """The rewrites of a denoiser that has none yet; ``linears`` are the layers that smoothing and branches take.

    A layer with fewer inputs or outputs than the rank gets a branch of as many, which holds all of its weight.

    Raises:
        InputError: one of ``linears`` is no linear layer of the denoiser.
    """
    smoothing = transforms.smoothing is not None
    suffix = ".layer" if smoothing else ""
    low_rank = {
        name + suffix: min(transforms.low_rank, *module_of_kind(hot, name, torch.nn.Linear).weight.shape)
        for name in linears
        if transforms.low_rank
    }
    return TransformSpec(
        _splits(hot, transforms.split_shortcut),
        tuple(linears) if smoothing else (),
        low_rank,
    )


def _splits(hot: HotDenoiser, which: str) -> dict[str, int]:
    found = hot.kind.split_shortcuts(hot.network) if which != "none" else {}
    return {path: leading for path, leading in found.items() if which == "all" or path.endswith(".conv_shortcut")}


def fit_transforms(
    hot: HotDenoiser,
    spec: TransformSpec,
    transforms: Transforms,
    dataset: LatentDataset,
    progress: Progress,
    *,
    latents: int = 64,
) -> None:
    """Gives the rewrites of ``hot``, whose ``spec`` is applied already, their values; its function stays the same.

    Smoothing factors come first, from up to ``latents`` stored points of every row; then every low-rank branch takes
    the largest part of its layer's smoothed weight.

    Raises:
        S2PError: an activation holds NaN or infinity.
    """
    if transforms.smoothing is not None:
        peaks = _input_peaks(hot, spec.smoothed, dataset, latents, progress)
        set_smoothing(hot, _shared_factors(hot, spec.smoothed, peaks, transforms.smoothing))
    for index, path in enumerate(spec.low_rank):
        module_of_kind(hot, path, LowRankLinear).decompose()
        progress("low-rank branches", index + 1, len(spec.low_rank))


def set_smoothing(hot: HotDenoiser, factors: Mapping[str, Tensor]) -> None:
    """Gives smoothed layers their factors float32 [in]; what the layers compute stays the same.

    Raises:
        InputError: a path is no smoothed layer, or its factor has another shape, or is not finite and above zero.
    """
    for path, factor in factors.items():
        module = module_of_kind(hot, path, SmoothedLinear)
        if factor.shape != module.factor.shape or not (torch.isfinite(factor) & (factor > 0)).all():
            raise InputError(
                f"smoothing factor of {path} must be {module.factor.numel()} finite numbers above zero,"
                f" got {list(factor.shape)} with minimum {float(factor.min())}"
            )
        module.set_factor(factor.to(module.factor))


def smoothing_factor(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """max|X_j|^alpha / max|W_j|^(1 - alpha) per input channel j (SmoothQuant, arXiv 2211.10438, equation 4).

    ``inputs`` and ``weights`` float32 [in] are the maxima. A channel counts as no smaller than 1e-5 of the largest; a
    tensor of zeros gives factors of one.
    """
    if not (inputs.any() and weights.any()):
        return torch.ones_like(inputs)
    floored = (peak.clamp_min(_FLOOR * peak.max()) for peak in (inputs, weights))
    of_inputs, of_weights = floored
    return of_inputs**alpha / of_weights ** (1 - alpha)


def _shared_factors(
    hot: HotDenoiser, paths: Sequence[str], peaks: Mapping[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """Factors by layer; layers that read one tensor share theirs, from the maxima over all of their weights."""
    columns = {path: module_of_kind(hot, path, SmoothedLinear).plain_weight().abs().amax(0) for path in paths}
    factors = {}
    for group in readers_by_tensor(hot, paths):
        weights = torch.stack([columns[path] for path in group]).amax(0)
        factors.update(dict.fromkeys(group, smoothing_factor(peaks[group[0]], weights, alpha)))
    return factors


@torch.no_grad()
def _input_peaks(
    hot: HotDenoiser, paths: Sequence[str], dataset: LatentDataset, latents: int, progress: Progress
) -> dict[str, Tensor]:
    """max|X| per channel, [in], of what the layers read, over all rows and both CFG branches."""
    peaks: dict[str, Tensor] = {}

    def observe(path: str, x: Tensor) -> None:
        peak = x.abs().flatten(0, -2).amax(0)
        peaks[path] = torch.maximum(peak, peaks.get(path, peak))

    modules = {path: module_of_kind(hot, path, SmoothedLinear) for path in paths}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, path=path: observe(path, args[0]))
        for path, module in modules.items()
    ]
    first = [np.flatnonzero(dataset.rows == row)[:latents] for row in np.unique(dataset.rows)]
    stored, done = points_at(dataset, np.concatenate(first)), 0
    try:
        for which in stored.batches():
            hot(*(argument.to(hot.network.device) for argument in stored.inputs(which)))
            done += len(which)
            progress("smoothing", done, len(stored.row))
    finally:
        for hook in hooks:
            hook.remove()
    for path, peak in peaks.items():
        if not torch.isfinite(peak).all():
            raise S2PError(f"the activation {path} is not finite: the pipeline's weights are broken")
    return peaks
