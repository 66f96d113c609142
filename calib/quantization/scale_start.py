"""Where training starts: closed-form scales of weights and, per calibrated row, grids of activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from s2p_deploy.calib.dataset.stored_points import points_at
from s2p_deploy.errors import S2PError
from s2p_deploy.numerics import (
    INT10,
    affine_grid,
    format_by_name,
    full_range,
    least_squares_weight_scale,
    max_scale,
    max_weight_scale,
    mse_best_range,
    mse_best_scale,
)
from s2p_deploy.recipe import Scales

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from s2p_deploy.families import HotDenoiser
    from s2p_deploy.numerics import IntegerFormat
    from s2p_deploy.progress import Progress
    from s2p_deploy.records import ActPoint, LatentDataset, PrecisionPlan

SAMPLED = 65_536  # elements of an activation that decide its MSE-best clip; more change it by less than a candidate
_DEFAULTS = Scales()


@dataclass(frozen=True)
class StartingGrids:
    """Activation grids of the calibrated rows, ascending.

    ``scales`` float32 [calibrated rows, points]. In simulation only: ``offsets`` float32 [calibrated rows, points], the
    value of code 0, and ``relaxed`` bool [calibrated rows], rows whose activations have 10 bits.
    """

    scales: Tensor
    offsets: Tensor | None = None
    relaxed: Tensor | None = None


def starting_weight_scales(hot: HotDenoiser, plan: PrecisionPlan, scales: Scales = _DEFAULTS) -> dict[str, Tensor]:
    """Scales float32 [out, 1, ...] of the sites whose weights the plan quantizes, as ``scales.weights`` says."""
    scale_of = least_squares_weight_scale if scales.weights == "least_squares" else max_weight_scale
    formats = {site.site: format_by_name(site.weights) for site in plan.sites}
    return {
        name: scale_of(hot.network.get_submodule(name).weight, fmt) for name, fmt in formats.items() if fmt is not None
    }


def calibrated_rows(dataset: LatentDataset) -> tuple[int, ...]:
    """The rows on which the dataset has points, ascending."""
    return tuple(int(row) for row in np.unique(dataset.rows))


def seen(dataset: LatentDataset, points: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stored ``points`` int64 [n] as the denoiser's arguments: 2n samples, one for either CFG branch."""
    both = points_at(dataset, points)
    return both.inputs(torch.arange(len(both.row)))


def starting_grids(
    hot: HotDenoiser, plan: PrecisionPlan, dataset: LatentDataset, scales: Scales, progress: Progress
) -> StartingGrids:
    """Grids of every calibrated row from up to ``scales.latents`` of its stored latents, both CFG branches of each.

    ``hot`` is the floating-point denoiser whose sites the plan names.

    Raises:
        S2PError: an activation holds NaN or infinity.
    """
    rows = calibrated_rows(dataset)
    finder = RangeFinder.of(plan, scales, rows)
    ranges, counts = [], []
    for index, row in enumerate(rows):
        points = np.flatnonzero(dataset.rows == row)
        ranges.append(finder.find(hot, *seen(dataset, points[: scales.latents])))
        counts.append(len(points))
        progress("scales", index + 1, len(rows))
    return finder.grids(rows, torch.stack(ranges), counts)


@dataclass(frozen=True)
class RangeFinder:
    """Finds the ranges that act points cover on a row, and makes grids of them.

    A range is float32 [points, 2], the lowest and the highest value that are not clipped; without zero points it is
    symmetric. Rows up to ``last_relaxed`` have 10-bit activations.
    """

    plan: PrecisionPlan
    scales: Scales
    last_relaxed: int

    @staticmethod
    def of(plan: PrecisionPlan, scales: Scales, rows: Sequence[int]) -> RangeFinder:
        """A finder for ascending ``rows``, whose share ``scales.relaxed`` nearest the picture is relaxed (rounded)."""
        count = round(scales.relaxed * len(rows))
        return RangeFinder(plan, scales, rows[count - 1] if count else -1)

    @torch.no_grad()
    def find(
        self, hot: HotDenoiser, sample: Tensor, rows: Tensor, texts: Tensor, added_cond: Tensor | None = None
    ) -> Tensor:
        """Ranges float32 [points, 2] on the CPU of what the sites of ``hot`` read in one call.

        Args:
            hot: a denoiser whose activations are not quantized.
            sample: float32 [batch, C, H, W] latents after ``scale_model_input``.
            rows: int64 [batch], the same row for all samples.
            texts: float32 [batch, tokens, D].
            added_cond: float32 [batch, A], not read where A is 0.

        Raises:
            S2PError: an activation holds NaN or infinity.
        """
        if not self.plan.act_points:
            return torch.zeros(0, 2)
        row = int(rows[0])
        found: dict[str, Tensor] = {}

        def observe(point: ActPoint, x: Tensor) -> None:
            found[point.name] = torch.stack(_range_of(x, self._format(point, row), self.scales)).cpu()

        hooks = [
            hot.network.get_submodule(point.sites[0]).register_forward_pre_hook(
                lambda _, args, point=point: observe(point, args[0])
            )
            for point in self.plan.act_points
        ]
        device = hot.network.device
        added = None if added_cond is None else added_cond.to(device)
        try:
            hot(sample.to(device), rows.to(device), texts.to(device), added)
        finally:
            for hook in hooks:
                hook.remove()
        for name, ends in found.items():
            if not torch.isfinite(ends).all():
                raise S2PError(f"the activation {name} is not finite on row {row}: the pipeline's weights are broken")
        return torch.stack([found[point.name] for point in self.plan.act_points])

    def grids(self, rows: Sequence[int], ranges: Tensor, counts: Sequence[int]) -> StartingGrids:
        """Grids of ``rows`` from their ranges float32 [rows, points, 2], collapsed where the recipe says so.

        A point that does not depend on the timestep has one range in every row, the mean where rows are kept apart.
        ``counts`` are the rows' weights in a mean: their stored points, whose timesteps a recipe may draw unevenly.
        """
        how = self.scales.timesteps
        one = [how != "each" or not point.timestep_dependent for point in self.plan.act_points]
        collapsed = _collapse(ranges, "mean" if how == "each" else how, torch.tensor(counts, dtype=ranges.dtype))
        ranges = torch.where(torch.tensor(one, dtype=torch.bool).unsqueeze(-1), collapsed, ranges)
        grids = torch.stack([self._row_grids(row, ends) for row, ends in zip(rows, ranges, strict=True)])
        return StartingGrids(
            scales=grids[..., 0],
            offsets=grids[..., 1] if self.scales.zero_point else None,
            relaxed=torch.tensor(rows) <= self.last_relaxed if self.last_relaxed >= 0 else None,
        )

    def _row_grids(self, row: int, ranges: Tensor) -> Tensor:
        """float32 [points, 2]: scale and offset."""
        grids = torch.zeros_like(ranges)
        for index, point in enumerate(self.plan.act_points):
            low, high = ranges[index]
            fmt = self._format(point, row)
            if self.scales.zero_point:
                grids[index] = torch.stack(affine_grid(low, high, fmt))
            else:
                grids[index, 0] = high / fmt.qmax
        return grids

    def _format(self, point: ActPoint, row: int) -> IntegerFormat:
        """A point's grid on a row. One scale of a text point serves all rows, so it is that of its own format."""
        if row <= self.last_relaxed and point.timestep_dependent:
            return INT10
        fmt = format_by_name(point.activations)
        assert fmt is not None, "act points are quantized"
        return fmt


def _range_of(x: Tensor, fmt: IntegerFormat, scales: Scales) -> tuple[Tensor, Tensor]:
    if scales.zero_point:
        return full_range(x) if scales.activations == "max" else mse_best_range(_sampled(x), fmt)
    scale = max_scale(x, fmt) if scales.activations == "max" else mse_best_scale(_sampled(x), fmt)
    return -scale * fmt.qmax, scale * fmt.qmax


def _collapse(ranges: Tensor, how: str, counts: Tensor) -> Tensor:
    """One range [points, 2] of [rows, points, 2]: the widest (``max``), the narrowest (``min``), or the mean."""
    low, high = ranges.unbind(-1)
    if how == "mean":
        return torch.einsum("r,rpe->pe", counts / counts.sum(), ranges)
    if how == "max":
        return torch.stack((low.amin(0), high.amax(0)), -1)
    return torch.stack((low.amax(0), high.amin(0)), -1)


def _sampled(x: Tensor) -> Tensor:
    """All elements, or a fixed random draw of them: even strides would meet the same columns again and again."""
    flat = x.flatten()
    if flat.numel() <= SAMPLED:
        return flat
    draw = torch.randint(flat.numel(), (SAMPLED,), generator=torch.Generator().manual_seed(0))
    return flat[draw.to(flat.device)]
