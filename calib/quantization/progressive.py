"""PCR's progressive calibration (arXiv 2311.06322): a row's grids come from latents that quantized calls have made."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from s2p_deploy.calib.dataset.trajectories import Itinerary, walk
from s2p_deploy.calib.quantization.scale_start import RangeFinder, StartingGrids, calibrated_rows
from s2p_deploy.calib.quantized_denoiser import QuantizedDenoiser, SampleGrids
from s2p_deploy.families import EncodedText, HotDenoiser
from s2p_deploy.records import PrecisionPlan

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from s2p_deploy.calib.dataset.sampler import Sampler
    from s2p_deploy.progress import Progress
    from s2p_deploy.recipe import Scales
    from s2p_deploy.records import LatentDataset, PromptSet


@dataclass(frozen=True)
class GuidedSampling:
    """What is walked: the prompts of ``dataset`` in its order."""

    prompts: PromptSet
    dataset: LatentDataset
    sampler: Sampler
    guidance_scale: float


@torch.no_grad()
def progressive_grids(
    hot: HotDenoiser,
    plan: PrecisionPlan,
    weight_scales: Mapping[str, Tensor],
    sampling: GuidedSampling,
    scales: Scales,
    progress: Progress,
) -> StartingGrids:
    """Grids of the dataset's rows, found from noise to picture on the trajectories of ``scales.latents`` prompts.

    Weights are quantized from the start. The first call on a row finds the row's grids from what its sites read while
    no activation of that call is quantized; then the call is made again with them, and its answer is the step that is
    taken. Both CFG branches are seen. A row that is called twice (PNDM) keeps its first grids. ``hot`` stays as it is.

    Args:
        hot: the floating-point denoiser whose sites the plan names.
        plan: formats of its sites.
        weight_scales: float32 [out, 1, ...] by site.
        sampling: prompts, their text states, and the schedule.
        scales: the recipe's; ``relaxed`` is a share of the dataset's rows.
        progress: told of every call of every prompt.

    Raises:
        S2PError: an activation holds NaN or infinity.
    """
    rows = calibrated_rows(sampling.dataset)
    teacher = _Progressive(hot, plan, weight_scales, RangeFinder.of(plan, scales, rows))
    itineraries = _whole_walks(sampling, scales.latents)
    total = sum(itinerary.length for itinerary in itineraries)
    slots = [(prompt,) for prompt in range(len(itineraries))]
    steps = walk(teacher, sampling.sampler, itineraries, slots, guidance_scale=sampling.guidance_scale)
    for done, _ in enumerate(steps, 1):
        progress("progressive scales", done, total)
    return teacher.finder.grids(rows, torch.stack([teacher.ranges[row] for row in rows]), [1] * len(rows))


def _whole_walks(sampling: GuidedSampling, count: int) -> list[Itinerary]:
    """The first prompts, each on its way to the schedule's last call: of one length, so they stay side by side."""
    dataset = sampling.dataset
    texts = EncodedText(torch.from_numpy(dataset.texts), torch.from_numpy(dataset.added_cond))
    last = (len(sampling.sampler.rows) - 1,)
    return [
        Itinerary(prompt, last, texts[int(dataset.cond_text[index])], texts[int(dataset.uncond_text[index])])
        for index, prompt in enumerate(sampling.prompts.first(count).prompts)
    ]


class _Progressive(HotDenoiser):
    """Answers as the quantized denoiser; a row that it has not met is calibrated first. A batch sits on one row."""

    def __init__(
        self, hot: HotDenoiser, plan: PrecisionPlan, weight_scales: Mapping[str, Tensor], finder: RangeFinder
    ) -> None:
        super().__init__(hot.network, hot.time, hot.config)
        self.observed = QuantizedDenoiser(copy.deepcopy(hot), _weights_only(plan), weight_scales, bake=True).hot
        self.quantized = QuantizedDenoiser(copy.deepcopy(hot), plan, weight_scales, bake=True)
        self.finder = finder
        self.ranges: dict[int, Tensor] = {}

    def forward(
        self, sample: Tensor, step_index: Tensor, encoder_hidden_states: Tensor, added_cond: Tensor | None = None
    ) -> Tensor:
        row, inputs = int(step_index[0]), (sample, step_index, encoder_hidden_states, added_cond)
        if row not in self.ranges:
            self.ranges[row] = self.finder.find(self.observed, *inputs)
        grids = self.finder.grids((row,), self.ranges[row].unsqueeze(0), (1,))
        output: Tensor = self.quantized(*inputs, _of_batch(grids, sample))
        return output


def _weights_only(plan: PrecisionPlan) -> PrecisionPlan:
    return PrecisionPlan(tuple(replace(site, act_point=None) for site in plan.sites), ())


def _of_batch(grids: StartingGrids, sample: Tensor) -> SampleGrids:
    """One row's grids for every sample of a batch."""

    def repeated(part: Tensor) -> Tensor:
        return part.to(sample.device).expand(len(sample), *part.shape[1:])

    return SampleGrids(
        repeated(grids.scales),
        None if grids.offsets is None else repeated(grids.offsets),
        None if grids.relaxed is None else repeated(grids.relaxed),
    )
