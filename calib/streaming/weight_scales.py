"""Closed-form weight scales, one weight in memory at a time; bit for bit those that other calibrations start from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from s2p_deploy.calib.quantized_denoiser import WeightQuantizer
from s2p_deploy.numerics import format_by_name, least_squares_weight_scale, max_weight_scale
from s2p_deploy.records.calibrated_model import parameter_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from s2p_deploy.progress import Progress
    from s2p_deploy.recipe import Scales
    from s2p_deploy.records import PrecisionPlan


def closed_form_scales(
    read: Callable[[str], Tensor], plan: PrecisionPlan, scales: Scales, progress: Progress
) -> dict[str, Tensor]:
    """Scales float32 [out, 1, ...] of the sites whose weights the plan quantizes, as ``scales.weights`` says.

    ``read`` gives a tensor of the hot denoiser's state by its name, in any floating-point dtype.
    """
    scale_of = least_squares_weight_scale if scales.weights == "least_squares" else max_weight_scale
    formats = {site.site: format_by_name(site.weights) for site in plan.sites}
    quantized = {site: fmt for site, fmt in formats.items() if fmt is not None}
    found = {}
    for number, (site, fmt) in enumerate(quantized.items()):
        scale = scale_of(read(parameter_name(f"{site}.weight")), fmt)
        found[site] = WeightQuantizer(scale, fmt).scale.detach()  # as models keep them: through their logarithm
        progress("weight scales", number + 1, len(quantized))
    return found
