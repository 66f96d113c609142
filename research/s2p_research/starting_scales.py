"""Starting scales of baselines: collapsed to one timestep's, asymmetric, or found on quantized trajectories (PCR).

Grids are [.., 3] numbers where an activation has zero points or 10 bits (``grids.py``), else the product's scales.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from s2p_deploy.calib.quantized_denoiser import QuantizedDenoiser
from s2p_deploy.calib.samples import calibrated_indices, samples_at
from s2p_deploy.calib.starting_scales import (
    activation_format,
    observe_quantizers,
    sampled,
    starting_weight_scales,
)
from s2p_deploy.calib.training_state import ActScales
from s2p_deploy.calib.trajectories import PromptWalk, Sampler, sampler_of, walk_trajectories
from s2p_deploy.families import EncodedText, IndexedDenoiser
from s2p_deploy.numerics import max_scale, mse_best_scale
from s2p_deploy.records import PrecisionPlan
from s2p_research.formats import INT10, weight_format
from s2p_research.grids import (
    SimulatedActScales,
    SimulatedInputQuantizer,
    affine_grid,
    full_range,
    mse_best_range,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from s2p_deploy.calib.request import CalibrationRequest
    from s2p_deploy.calib.trajectories import FloatPipeline
    from s2p_deploy.context import Progress
    from s2p_deploy.numerics import IntegerFormat
    from s2p_deploy.records import ActivationQuantizer, LatentDataset, PromptSet
    from s2p_research.recipe import ResearchRecipe, ResearchScales


def research_starting_scales(
    recipe: ResearchRecipe,
    request: CalibrationRequest,
    source: FloatPipeline,
    plan: PrecisionPlan,
    dataset: LatentDataset,
) -> tuple[dict[str, Tensor], Tensor]:
    """Finds weight scales by layer, and activation scales [calibrated, quantizers] or grids [.., 3], of a recipe."""
    scales, progress, guidance = recipe.scales, request.context.progress, recipe.sampling.guidance_scale
    assert guidance is not None, "the recipe is resolved"
    weight_scales = starting_weight_scales(source.denoiser, plan, scales, weight_format)
    if not scales.progressive:
        return weight_scales, starting_grids(source.denoiser, plan, dataset, scales, progress)
    sampler = sampler_of(source.pipe, source.timesteps, recipe.sampling.steps)
    sampling = GuidedSampling(request.prompts, dataset, sampler, guidance)
    return weight_scales, progressive_grids(source.denoiser, plan, weight_scales, sampling, scales, progress)


def research_act_scales(recipe: ResearchRecipe, plan: PrecisionPlan, starting: Tensor) -> ActScales:
    """Makes the trained scales from starting scales [calibrated, quantizers] or grids [calibrated, quantizers, 3]."""
    one_for_all = recipe.scales.timesteps != "each" or recipe.scales.calibrator != "own"
    static = [one_for_all or not quantizer.timestep_dependent for quantizer in plan.activation_quantizers]
    return (ActScales if starting.dim() == 2 else SimulatedActScales)(starting, static)


def starting_grids(
    denoiser: IndexedDenoiser, plan: PrecisionPlan, dataset: LatentDataset, scales: ResearchScales, progress: Progress
) -> Tensor:
    """Finds the grids of every calibrated timestep from up to ``scales.latents`` samples, both CFG branches of each.

    Raises:
        S2PError: an activation holds NaN or infinity.
    """
    indices = calibrated_indices(dataset)
    finder = RangeFinder.of(plan, scales, indices)
    ranges, counts = [], []
    for number, index in enumerate(indices):
        which = np.flatnonzero(dataset.timestep_indices == index)
        pairs = samples_at(dataset, which[: scales.latents])
        ranges.append(finder.find(denoiser, pairs.inputs(torch.arange(len(pairs.sample)))))
        counts.append(len(which))
        progress("scales", number + 1, len(indices))
    return finder.grids(indices, torch.stack(ranges), counts)


@dataclass(frozen=True)
class RangeFinder:
    """Finds the ranges that activation quantizers cover at a timestep, and makes grids of them.

    A range is float32 [quantizers, 2], the lowest and the highest value that are not clipped; without zero points it is
    symmetric. Timestep indices up to ``last_relaxed`` have 10-bit activations.
    """

    plan: PrecisionPlan
    scales: ResearchScales
    last_relaxed: int

    @staticmethod
    def of(plan: PrecisionPlan, scales: ResearchScales, indices: Sequence[int]) -> RangeFinder:
        """Makes a finder for ascending timestep indices; the share ``scales.relaxed`` of them is relaxed (rounded)."""
        count = round(scales.relaxed * len(indices))
        return RangeFinder(plan, scales, indices[count - 1] if count else -1)

    def find(self, denoiser: IndexedDenoiser, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> Tensor:
        """Finds the ranges float32 [quantizers, 2] of one call, as :func:`observe_quantizers`."""
        index = int(inputs[1][0])

        def measure(quantizer: ActivationQuantizer, x: Tensor) -> Tensor:
            return torch.stack(_range_of(x, self._format(quantizer, index), self.scales))

        ranges = observe_quantizers(denoiser, self.plan, inputs, measure)
        return ranges if len(ranges) else torch.zeros(0, 2)

    def grids(self, indices: Sequence[int], ranges: Tensor, counts: Sequence[int]) -> Tensor:
        """Makes grids from ranges float32 [timesteps, quantizers, 2], collapsed where the recipe says so.

        A quantizer that does not depend on the timestep has one range, the mean where timesteps are kept apart.
        ``counts`` are the timesteps' weights in a mean: their samples, which a recipe may draw unevenly.
        """
        how = self.scales.timesteps
        one = [how != "each" or not quantizer.timestep_dependent for quantizer in self.plan.activation_quantizers]
        collapsed = _collapse(ranges, "mean" if how == "each" else how, torch.tensor(counts, dtype=ranges.dtype))
        ranges = torch.where(torch.tensor(one, dtype=torch.bool).unsqueeze(-1), collapsed, ranges)
        grids = torch.stack([self._grid(index, ends) for index, ends in zip(indices, ranges, strict=True)])
        simulated = self.scales.zero_point or self.last_relaxed >= 0
        return grids if simulated else grids[..., 0].contiguous()

    def _grid(self, index: int, ranges: Tensor) -> Tensor:
        """Makes float32 [quantizers, 3]: scale, offset, and 1 where the timestep is relaxed."""
        grid = torch.zeros(len(ranges), 3)
        grid[:, 2] = float(index <= self.last_relaxed)
        for column, quantizer in enumerate(self.plan.activation_quantizers):
            low, high = ranges[column]
            fmt = self._format(quantizer, index)
            if self.scales.zero_point:
                grid[column, :2] = torch.stack(affine_grid(low, high, fmt))
            else:
                grid[column, 0] = high / fmt.qmax
        return grid

    def _format(self, quantizer: ActivationQuantizer, index: int) -> IntegerFormat:
        """Returns a quantizer's format; one of the text has one scale for all timesteps, that of its own format."""
        if index <= self.last_relaxed and quantizer.timestep_dependent:
            return INT10
        return activation_format(quantizer)


def _range_of(x: Tensor, fmt: IntegerFormat, scales: ResearchScales) -> tuple[Tensor, Tensor]:
    if scales.zero_point:
        return full_range(x) if scales.activations == "max" else mse_best_range(sampled(x), fmt)
    scale = max_scale(x, fmt) if scales.activations == "max" else mse_best_scale(sampled(x), fmt)
    return -scale * fmt.qmax, scale * fmt.qmax


def _collapse(ranges: Tensor, how: str, counts: Tensor) -> Tensor:
    """Reduces [timesteps, quantizers, 2] to one range: the widest (``max``), the narrowest (``min``), or the mean."""
    low, high = ranges.unbind(-1)
    if how == "mean":
        return torch.einsum("r,rpe->pe", counts / counts.sum(), ranges)
    if how == "max":
        return torch.stack((low.amin(0), high.amax(0)), -1)
    return torch.stack((low.amax(0), high.amin(0)), -1)


@dataclass(frozen=True)
class GuidedSampling:
    """The prompts of ``dataset``, in its order, and the schedule to walk them under."""

    prompts: PromptSet
    dataset: LatentDataset
    sampler: Sampler
    guidance_scale: float


@torch.no_grad()
def progressive_grids(
    denoiser: IndexedDenoiser,
    plan: PrecisionPlan,
    weight_scales: Mapping[str, Tensor],
    sampling: GuidedSampling,
    scales: ResearchScales,
    progress: Progress,
) -> Tensor:
    """Finds grids from noise to picture on the trajectories of ``scales.latents`` prompts (PCR, arXiv 2311.06322).

    Weights are quantized from the start. The first call at a timestep finds its grids from what its layers read while
    no activation of that call is quantized; then the call is made again with them, and its output is the step that is
    taken. Both CFG branches are seen. A timestep that is called twice (PNDM) keeps its first grids.

    Args:
        denoiser: the floating-point denoiser whose layers the plan names; stays as it is.
        plan: formats of its layers.
        weight_scales: float32 [out, 1, ...] by layer.
        sampling: prompts, their text states, and the schedule.
        scales: the recipe's; ``relaxed`` is a share of the dataset's timesteps.
        progress: called after every call of every prompt.

    Raises:
        S2PError: an activation holds NaN or infinity.
    """
    indices = calibrated_indices(sampling.dataset)
    progressive = _Progressive(denoiser, plan, weight_scales, RangeFinder.of(plan, scales, indices))
    walks = _whole_walks(sampling, scales.latents)
    total = sum(each.length for each in walks)
    slots = [(prompt,) for prompt in range(len(walks))]
    steps = walk_trajectories(progressive, sampling.sampler, walks, slots, guidance_scale=sampling.guidance_scale)
    for done, _ in enumerate(steps, 1):
        progress("progressive scales", done, total)
    ranges = torch.stack([progressive.ranges[index] for index in indices])
    return progressive.finder.grids(indices, ranges, [1] * len(indices))


def _whole_walks(sampling: GuidedSampling, count: int) -> list[PromptWalk]:
    """Walks the first prompts to the schedule's last call: all of one length, so they stay side by side."""
    dataset = sampling.dataset
    texts = EncodedText(torch.from_numpy(dataset.texts), torch.from_numpy(dataset.added_cond))
    last = (len(sampling.sampler.indices) - 1,)
    return [
        PromptWalk(prompt, last, texts[int(dataset.cond_text[number])], texts[int(dataset.uncond_text[number])])
        for number, prompt in enumerate(sampling.prompts.first(count).prompts)
    ]


class _Progressive(IndexedDenoiser):
    """Predicts as the quantized denoiser; a timestep that it has not met is calibrated first.

    All samples of a batch have one timestep.
    """

    def __init__(
        self, denoiser: IndexedDenoiser, plan: PrecisionPlan, weight_scales: Mapping[str, Tensor], finder: RangeFinder
    ) -> None:
        super().__init__(denoiser.network, denoiser.time, denoiser.config)
        weights_only = PrecisionPlan(tuple(replace(layer, activation_quantizer=None) for layer in plan.layers), ())
        self.observed = self._quantized(denoiser, weights_only, weight_scales).inner
        self.quantized = self._quantized(denoiser, plan, weight_scales)
        self.finder = finder
        self.ranges: dict[int, Tensor] = {}

    @staticmethod
    def _quantized(
        denoiser: IndexedDenoiser, plan: PrecisionPlan, weight_scales: Mapping[str, Tensor]
    ) -> QuantizedDenoiser:
        return QuantizedDenoiser(
            copy.deepcopy(denoiser),
            plan,
            weight_scales,
            bake=True,
            weight_format=weight_format,
            input_quantizer=SimulatedInputQuantizer,
        )

    def forward(  # type: ignore[override]  # ranges are found without adapters
        self, sample: Tensor, timestep_index: Tensor, encoder_hidden_states: Tensor, added_cond: Tensor | None = None
    ) -> Tensor:
        index, inputs = int(timestep_index[0]), (sample, timestep_index, encoder_hidden_states, added_cond)
        if index not in self.ranges:
            self.ranges[index] = self.finder.find(self.observed, inputs)
        grids = self.finder.grids((index,), self.ranges[index].unsqueeze(0), (1,))
        output: Tensor = self.quantized(*inputs, grids.to(sample.device).expand(len(sample), *grids.shape[1:]))
        return output
