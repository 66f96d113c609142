"""Where training starts: closed-form scales of weights and, per calibrated row, of activations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from s2p_deploy.errors import S2PError
from s2p_deploy.numerics import format_by_name, least_squares_weight_scale, mse_best_scale

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from s2p_deploy.families import HotDenoiser
    from s2p_deploy.numerics import IntegerFormat
    from s2p_deploy.progress import Progress
    from s2p_deploy.records import LatentDataset, PrecisionPlan

SAMPLED = 65_536  # elements of an activation that decide its scale; more change it by less than one candidate's step


def starting_weight_scales(hot: HotDenoiser, plan: PrecisionPlan) -> dict[str, Tensor]:
    """Least-squares scales float32 [out, 1, ...] of the sites whose weights the plan quantizes."""
    scales = {}
    for site in plan.sites:
        fmt = format_by_name(site.weights)
        if fmt is not None:
            scales[site.site] = least_squares_weight_scale(hot.unet.get_submodule(site.site).weight, fmt)
    return scales


def calibrated_rows(dataset: LatentDataset) -> tuple[int, ...]:
    """The rows on which the dataset has points, ascending."""
    return tuple(int(row) for row in np.unique(dataset.rows))


@torch.no_grad()
def starting_act_scales(
    hot: HotDenoiser, plan: PrecisionPlan, dataset: LatentDataset, latents: int, progress: Progress
) -> Tensor:
    """MSE-best scales float32 [calibrated rows, points] over up to ``latents`` stored latents of each row.

    Both CFG branches are seen. A point that does not depend on the timestep gets one scale, the geometric mean over
    the rows, in every row. ``hot`` is the floating-point denoiser.

    Raises:
        S2PError: an activation holds NaN or infinity.
    """
    rows = calibrated_rows(dataset)
    scales = torch.empty(len(rows), len(plan.act_points))
    for index, row in enumerate(rows):
        if plan.act_points:
            scales[index] = _row_scales(hot, plan, dataset, row, latents)
        progress("scales", index + 1, len(rows))
    static = torch.tensor([not point.timestep_dependent for point in plan.act_points], dtype=torch.bool)
    scales[:, static] = scales[:, static].log().mean(0).exp()
    return scales


def _row_scales(hot: HotDenoiser, plan: PrecisionPlan, dataset: LatentDataset, row: int, latents: int) -> Tensor:
    sample, texts = _both_branches(dataset, np.flatnonzero(dataset.rows == row)[:latents])
    found: dict[str, Tensor] = {}

    def observe(point: str, fmt: IntegerFormat, x: Tensor) -> None:
        found[point] = mse_best_scale(_sampled(x), fmt)

    hooks = []
    for point in plan.act_points:
        fmt = format_by_name(point.activations)
        assert fmt is not None, "act points are quantized"
        reader = hot.unet.get_submodule(point.sites[0])
        hooks.append(
            reader.register_forward_pre_hook(lambda _, args, name=point.name, fmt=fmt: observe(name, fmt, args[0]))
        )
    try:
        hot(sample, torch.full((len(sample),), row), texts)
    finally:
        for hook in hooks:
            hook.remove()
    scales = torch.stack([found[point.name] for point in plan.act_points])
    bad = ~torch.isfinite(scales)
    if bad.any():
        name = plan.act_points[int(bad.nonzero()[0])].name
        raise S2PError(f"the activation {name} is not finite at timestep {row}: the pipeline's weights are broken")
    return scales


def _both_branches(dataset: LatentDataset, points: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    sample = torch.from_numpy(dataset.latents[points]).float()
    prompt = dataset.prompt[points]
    texts = np.concatenate([dataset.uncond_text[prompt], dataset.cond_text[prompt]])
    return torch.cat([sample, sample]), torch.from_numpy(dataset.texts[texts])


def _sampled(x: Tensor) -> Tensor:
    """All elements, or a fixed random draw of them: even strides would meet the same columns again and again."""
    flat = x.flatten()
    if flat.numel() <= SAMPLED:
        return flat
    return flat[torch.randint(flat.numel(), (SAMPLED,), generator=torch.Generator().manual_seed(0))]
