"""Weights of 3, 5 or 9 levels where they cost little: BitsFusion's choice of bits (arXiv 2406.04333, section 3.3).

Each INT4 site alone is put on each of the three grids; M_ib is the mean squared error of the output that this makes.
Its score is S_ib = M_ib * N_i^-0.3 for N_i weights, so that large sites lose bits first. A site gets the fewest levels
with a score of at most a threshold, one for all sites, and stays INT4 where none has it. The paper trains every
candidate briefly before it measures; here each is measured as quantized, without training, over stored latents and both
texts.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from s2p_deploy.calib.dataset.stored_points import draw_points
from s2p_deploy.calib.quantization.plan import SENSITIVE
from s2p_deploy.numerics import (
    INT4,
    LEVELS3,
    LEVELS5,
    LEVELS9,
    IntegerFormat,
    fake_quantize,
    least_squares_weight_scale,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from s2p_deploy.calib.dataset.stored_points import StoredPoints
    from s2p_deploy.families import HotDenoiser
    from s2p_deploy.progress import Progress
    from s2p_deploy.recipe import Mixed
    from s2p_deploy.records import LatentDataset, PrecisionPlan, SitePlan

CANDIDATES = (LEVELS3, LEVELS5, LEVELS9)
LOW_BIT = "low_bit"  # added to the rule of a site with fewer bits than the rules gave
_SIZE_POWER = -0.3
_SEED = 0


def low_bit_plan(
    hot: HotDenoiser, plan: PrecisionPlan, dataset: LatentDataset, mixed: Mixed, progress: Progress
) -> PrecisionPlan:
    """``plan`` with 3, 5, 9 or 16 levels for the weights of the rules' INT4 sites, on average ``mixed.low_bit`` bits.

    Or just below. Sites that mixed precision calls sensitive are left alone. The average is over the weights of the
    others, log2(levels) bits each, and not below the 1.58 bits of three levels everywhere. ``mixed.latents`` stored
    points decide. Activations stay as they are.

    Args:
        hot: the floating-point denoiser, left as it was.
        plan: formats of all sites.
        dataset: stored points.
        mixed: the average that is asked for; None changes nothing.
        progress: told about every site.
    """
    sites = [site.site for site in plan.sites if site.weights == INT4.name and site.rule != SENSITIVE]
    if mixed.low_bit is None or not sites:
        return plan
    weights = {name: hot.network.get_submodule(name).weight.detach() for name in sites}
    sizes = [weight.numel() for weight in weights.values()]
    errors = _output_errors(hot, weights, draw_points(dataset, mixed.latents, _SEED), progress)
    scores = [[error * size**_SIZE_POWER for error in row] for row, size in zip(errors, sizes, strict=True)]
    formats = dict(zip(sites, choose_formats(scores, sizes, mixed.low_bit), strict=True))
    fewer = {name: fmt.name for name, fmt in formats.items() if fmt != INT4}
    return replace(plan, sites=tuple(_with_weights(site, fewer.get(site.site)) for site in plan.sites))


def choose_formats(
    scores: Sequence[Sequence[float]], sizes: Sequence[int], average: float
) -> tuple[IntegerFormat, ...]:
    """One format per site: the smallest threshold on the scores whose average bits are at most ``average``.

    Where no threshold gets there, the largest score.

    Args:
        scores: of every site at each of ``CANDIDATES``.
        sizes: number of weights of every site.
        average: bits per weight.
    """

    def formats(threshold: float) -> tuple[IntegerFormat, ...]:
        return tuple(_fewest_levels(row, threshold) for row in scores)

    def saved(threshold: float) -> float:
        """Grows with the threshold, as bisection needs it."""
        bits = [fmt.bits * size for fmt, size in zip(formats(threshold), sizes, strict=True)]
        return -sum(bits) / sum(sizes)

    thresholds = sorted({0.0, *(score for row in scores for score in row)})
    place = bisect_left(thresholds, -average, key=saved)
    return formats(thresholds[min(place, len(thresholds) - 1)])


def _fewest_levels(scores: Sequence[float], threshold: float) -> IntegerFormat:
    return next((fmt for fmt, score in zip(CANDIDATES, scores, strict=True) if score <= threshold), INT4)


def _with_weights(site: SitePlan, fewer: str | None) -> SitePlan:
    return site if fewer is None else replace(site, weights=fewer, rule=f"{site.rule}, {LOW_BIT}")


@torch.no_grad()
def _output_errors(
    hot: HotDenoiser, weights: Mapping[str, Tensor], points: StoredPoints, progress: Progress
) -> list[list[float]]:
    """M_ib of every site (rows) at each candidate, everything else in floating point."""
    exact = [hot(*_inputs(hot, points, which)) for which in points.batches()]
    errors = []
    for index, (name, weight) in enumerate(weights.items()):
        errors.append([_output_error(hot, name, _on_grid(weight, fmt), points, exact) for fmt in CANDIDATES])
        progress("low bits", index + 1, len(weights))
    return errors


def _inputs(hot: HotDenoiser, points: StoredPoints, which: Tensor) -> tuple[Tensor, ...]:
    return tuple(argument.to(hot.network.device) for argument in points.inputs(which))


def _on_grid(weight: Tensor, fmt: IntegerFormat) -> Tensor:
    return fake_quantize(weight, least_squares_weight_scale(weight, fmt), fmt)


def _output_error(hot: HotDenoiser, name: str, weight: Tensor, points: StoredPoints, exact: Sequence[Tensor]) -> float:
    changed = {f"network.{name}.weight": weight}
    total = 0.0
    for which, expected in zip(points.batches(), exact, strict=True):
        output = torch.func.functional_call(hot, changed, _inputs(hot, points, which))
        total += float((output - expected).square().sum())
    return total / points.sample.numel()
