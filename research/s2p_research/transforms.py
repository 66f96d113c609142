"""Rewrites of the denoiser for comparisons: smoothing by its own calibration, and SVDQuant's low-rank branches."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from s2p_deploy.calib.modelopt import set_smoothing
from s2p_deploy.calib.plan import Transforms, plan_from_recipe, split_shortcuts
from s2p_deploy.calib.shifts import input_ranges
from s2p_deploy.errors import InputError
from s2p_deploy.families import (
    SmoothedLinear,
    discover_layers,
    module_of_type,
    put_module,
    readers_by_tensor,
)
from s2p_deploy.recipe import Rule

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from s2p_deploy.context import Progress
    from s2p_deploy.families import IndexedDenoiser
    from s2p_deploy.records import LatentDataset, TransformSpec
    from s2p_research import recipe as sections
    from s2p_research.recipe import ResearchRecipe

FILE = "low_rank.json"
_FLOOR = 1e-5  # smallest peak of a channel, as a share of its tensor's: silent channels get no extreme factor


@dataclass(frozen=True)
class ResearchTransforms(Transforms):
    """The product's rewrites, then branches of rank ``low_rank`` by path (``.layer`` where it was smoothed).

    ``smoothing`` is SmoothQuant's alpha, found from up to ``latents`` samples per timestep.
    """

    low_rank: Mapping[str, int] = field(default_factory=dict)
    smoothing: float | None = None
    latents: int = 64

    def apply(self, denoiser: IndexedDenoiser) -> None:
        """Rewrites the modules of a denoiser in place; what it computes stays the same."""
        super().apply(denoiser)
        apply_low_rank(denoiser, self.low_rank)

    def fit(self, denoiser: IndexedDenoiser, dataset: LatentDataset, progress: Progress) -> None:
        """Finds smoothing factors; then every branch takes the largest part of its layer's smoothed weight.

        Raises:
            S2PError: an activation holds NaN or infinity.
        """
        if self.smoothing is not None:
            paths = self.spec.smoothed
            ranges = input_ranges(denoiser, paths, dataset, self.latents, progress)
            peaks = {path: torch.maximum(-low, high).to(denoiser.device) for path, (low, high) in ranges.items()}
            set_smoothing(denoiser, _shared_factors(denoiser, paths, peaks, self.smoothing))
        for number, path in enumerate(self.low_rank):
            module_of_type(denoiser, path, LowRankLinear).decompose()
            progress("low-rank branches", number + 1, len(self.low_rank))


def research_transforms(denoiser: IndexedDenoiser, recipe: ResearchRecipe) -> Transforms:
    """Makes the rewrites of a recipe for a denoiser that has none yet.

    Smoothing and branches take the linear layers with quantized activations. A layer with fewer inputs or outputs than
    the rank gets a branch of as many, which holds all of its weight.
    """
    transforms, section = split_shortcuts(denoiser, recipe), recipe.transforms
    if section.smoothing is None and not section.low_rank:
        return transforms
    plan = plan_from_recipe(recipe, discover_layers(denoiser))
    linears = [layer.name for layer in plan.layers if layer.op == "linear" and layer.activation_quantizer is not None]
    return transforms_of_linears(denoiser, transforms.spec, section, linears, recipe.scales.latents)


def transforms_of_linears(
    denoiser: IndexedDenoiser,
    spec: TransformSpec,
    section: sections.ResearchTransforms,
    linears: Sequence[str],
    latents: int = 64,
) -> ResearchTransforms:
    """Adds smoothing and branches of ``linears`` to the rewrites of ``spec``.

    Raises:
        InputError: one of ``linears`` is no linear layer of the denoiser.
    """
    suffix = "" if section.smoothing is None else ".layer"
    low_rank = {
        name + suffix: min(section.low_rank, *module_of_type(denoiser, name, nn.Linear).weight.shape)
        for name in linears
        if section.low_rank
    }
    halves = [f"{path}.{half}" for path in low_rank for half in ("down", "up")]
    return ResearchTransforms(
        spec=spec if section.smoothing is None else replace(spec, smoothed=tuple(linears)),
        rules=tuple(Rule(match=half, weights="none", activations="none") for half in halves),
        low_rank=low_rank,
        smoothing=section.smoothing,
        latents=latents,
    )


def apply_low_rank(denoiser: IndexedDenoiser, low_rank: Mapping[str, int]) -> None:
    """Puts an empty branch of a rank beside each linear layer.

    Raises:
        InputError: a path is no linear layer of the denoiser, or has too few inputs or outputs.
    """
    for path, rank in low_rank.items():
        linear = module_of_type(denoiser, path, nn.Linear)
        if not 0 < rank <= min(linear.in_features, linear.out_features):
            raise InputError(
                f"transform: {path} has {linear.in_features} inputs and {linear.out_features} outputs,"
                f" too few for a branch of rank {rank}: choose a smaller transforms.low_rank"
            )
        put_module(denoiser, path, LowRankLinear(linear, rank))


def write_low_rank(denoiser: IndexedDenoiser, folder: Path) -> None:
    """Writes the ranks of a denoiser's branches by path; nothing without any."""
    modules = denoiser.network.named_modules()
    ranks = {name: module.down.out_features for name, module in modules if isinstance(module, LowRankLinear)}
    if ranks:
        (folder / FILE).write_text(json.dumps(ranks, indent=1) + "\n", encoding="utf-8")


def read_low_rank(folder: Path) -> dict[str, int]:
    """Reads the ranks of :func:`write_low_rank`."""
    file = folder / FILE
    ranks: dict[str, int] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return ranks


class LowRankLinear(nn.Module):
    """A linear layer with a floating-point branch beside it: ``residual(x) + up(down(x))`` (SVDQuant, 2411.05007).

    ``residual`` is the layer and owns the bias; ``down`` [rank, in] and ``up`` [out, rank] start at zero.
    """

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.residual = linear
        self.down = _zero_linear(linear.in_features, rank, linear.weight)
        self.up = _zero_linear(rank, linear.out_features, linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] to [..., out]."""
        output: Tensor = self.residual(x) + self.up(self.down(x))
        return output

    @property
    def weight(self) -> Tensor:
        """Returns the residual's weight, all of it until :meth:`decompose`; smoothing multiplies it."""
        return self.residual.weight

    def whole_weight(self) -> Tensor:
        """Computes the weight [out, in] of branch and residual together."""
        return self.residual.weight.detach() + self.up.weight.detach() @ self.down.weight.detach()

    @torch.no_grad()
    def decompose(self) -> None:
        """Moves the best approximation of the whole weight of this rank into the branch (by SVD, halves balanced)."""
        whole = self.whole_weight()
        left, values, right = torch.linalg.svd(whole.float(), full_matrices=False)
        rank = self.down.out_features
        root = values[:rank].sqrt()
        self.up.weight.copy_(left[:, :rank] * root)
        self.down.weight.copy_(root[:, None] * right[:rank])
        self.residual.weight.copy_(whole - self.up.weight @ self.down.weight)


def _zero_linear(inputs: int, outputs: int, like: Tensor) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=False, device="meta")  # draws no random number
    linear.weight = nn.Parameter(like.detach().new_zeros(outputs, inputs))
    return linear


def smoothing_factor(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Computes max|X_j|^alpha / max|W_j|^(1 - alpha) per input channel j (SmoothQuant, arXiv 2211.10438, equation 4).

    ``inputs`` and ``weights`` float32 [in] are the maxima. A channel counts as no smaller than 1e-5 of the largest; a
    tensor of zeros gives factors of one.
    """
    if not (inputs.any() and weights.any()):
        return torch.ones_like(inputs)
    floored = (peak.clamp_min(_FLOOR * peak.max()) for peak in (inputs, weights))
    of_inputs, of_weights = floored
    return of_inputs**alpha / of_weights ** (1 - alpha)


def _shared_factors(
    denoiser: IndexedDenoiser, paths: Sequence[str], peaks: Mapping[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """Computes factors by layer; layers that read one tensor share theirs, from the maxima of all their weights."""
    columns = {path: module_of_type(denoiser, path, SmoothedLinear).plain_weight().abs().amax(0) for path in paths}
    factors = {}
    for group in readers_by_tensor(denoiser, paths):
        weights = torch.stack([columns[path] for path in group]).amax(0)
        factors.update(dict.fromkeys(group, smoothing_factor(peaks[group[0]], weights, alpha)))
    return factors
