"""Weights of 3, 5 or 9 levels where they cost little: BitsFusion's choice of bits (arXiv 2406.04333, section 3.3).

Each INT4 layer alone is put on each of the three grids; M_ib is the mean squared error of the output that this makes.
Its score is S_ib = M_ib * N_i^-0.3 for N_i weights, so that large layers lose bits first. A layer gets the fewest
levels with a score of at most a threshold, one for all layers, and stays INT4 where none has it. The paper trains every
candidate briefly before it measures; here each is measured as quantized, without training, over stored latents and both
texts.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from s2p_deploy.calib.plan import SENSITIVE
from s2p_deploy.calib.samples import draw_samples
from s2p_deploy.numerics import INT4, fake_quantize, least_squares_weight_scale
from s2p_research.formats import LOW_BIT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from s2p_deploy.calib.samples import SamplePairs
    from s2p_deploy.context import Progress
    from s2p_deploy.families import IndexedDenoiser
    from s2p_deploy.numerics import IntegerFormat
    from s2p_deploy.records import LatentDataset, LayerPlan, PrecisionPlan
    from s2p_research.recipe import ResearchMixed

_SIZE_POWER = -0.3
_SEED = 0


def low_bit_plan(
    denoiser: IndexedDenoiser, plan: PrecisionPlan, dataset: LatentDataset, mixed: ResearchMixed, progress: Progress
) -> PrecisionPlan:
    """Gives weights of the rules' INT4 layers 3, 5, 9 or 16 levels, on average at most ``mixed.low_bit`` bits.

    A layer's rule then ends with the name of its format. Layers that mixed precision calls sensitive are left alone.
    The average is over the weights of the others, log2(levels) bits each, and not below the 1.58 bits of three levels
    everywhere. ``mixed.latents`` samples decide. Activations stay as they are.

    Args:
        denoiser: the floating-point denoiser, left as it was.
        plan: formats of all layers.
        dataset: samples to measure with.
        mixed: the average; None changes nothing.
        progress: called after every layer.
    """
    layers = [layer.name for layer in plan.layers if layer.weights == INT4.name and layer.rule != SENSITIVE]
    if mixed.low_bit is None or not layers:
        return plan
    weights = {name: denoiser.network.get_submodule(name).weight.detach() for name in layers}
    sizes = [weight.numel() for weight in weights.values()]
    errors = _output_errors(denoiser, weights, draw_samples(dataset, mixed.latents, _SEED), progress)
    scores = [[error * size**_SIZE_POWER for error in row] for row, size in zip(errors, sizes, strict=True)]
    formats = dict(zip(layers, choose_formats(scores, sizes, mixed.low_bit), strict=True))
    fewer = {name: fmt.name for name, fmt in formats.items() if fmt != INT4}
    return replace(plan, layers=tuple(_with_rule(layer, fewer.get(layer.name)) for layer in plan.layers))


def choose_formats(
    scores: Sequence[Sequence[float]], sizes: Sequence[int], average: float
) -> tuple[IntegerFormat, ...]:
    """Chooses one format per layer: by the smallest threshold on the scores whose average bits are at most ``average``.

    Where no threshold gets there, the largest score.

    Args:
        scores: of every layer at each of ``LOW_BIT``.
        sizes: number of weights of every layer.
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
    return next((fmt for fmt, score in zip(LOW_BIT, scores, strict=True) if score <= threshold), INT4)


def _with_rule(layer: LayerPlan, fewer: str | None) -> LayerPlan:
    return layer if fewer is None else replace(layer, rule=f"{layer.rule}, {fewer}")


@torch.no_grad()
def _output_errors(
    denoiser: IndexedDenoiser, weights: Mapping[str, Tensor], pairs: SamplePairs, progress: Progress
) -> list[list[float]]:
    """Measures M_ib of every layer at each candidate, everything else in floating point."""
    exact = [denoiser(*_inputs(denoiser, pairs, which)) for which in pairs.batches()]
    errors = []
    for index, (name, weight) in enumerate(weights.items()):
        errors.append([_output_error(denoiser, name, _on_grid(weight, fmt), pairs, exact) for fmt in LOW_BIT])
        progress("low bits", index + 1, len(weights))
    return errors


def _inputs(denoiser: IndexedDenoiser, pairs: SamplePairs, which: Tensor) -> tuple[Tensor, ...]:
    return tuple(argument.to(denoiser.device) for argument in pairs.inputs(which))


def _on_grid(weight: Tensor, fmt: IntegerFormat) -> Tensor:
    return fake_quantize(weight, least_squares_weight_scale(weight, fmt), fmt)


def _output_error(
    denoiser: IndexedDenoiser, name: str, weight: Tensor, pairs: SamplePairs, exact: Sequence[Tensor]
) -> float:
    changed = {f"network.{name}.weight": weight}
    total = 0.0
    for which, expected in zip(pairs.batches(), exact, strict=True):
        output = torch.func.functional_call(denoiser, changed, _inputs(denoiser, pairs, which))
        total += float((output - expected).square().sum())
    return total / pairs.sample.numel()
