"""Closed-form weight scales, one weight in memory at a time; bit for bit those that other calibrations start from."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from s2p_deploy.calib.quantized_denoiser import WeightQuantizer
from s2p_deploy.numerics import format_by_name, least_squares_weight_scale, max_weight_scale
from s2p_deploy.records.calibrated_model import parameter_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from s2p_deploy.numerics import IntegerFormat
    from s2p_deploy.progress import Progress
    from s2p_deploy.recipe import Scales
    from s2p_deploy.records import PrecisionPlan

_BLOCK = 1 << 18  # weights at a time: what stays in a processor's cache is done in a sixth of the time


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
        scale = _by_blocks(read(parameter_name(f"{site}.weight")), fmt, scale_of)
        found[site] = WeightQuantizer(scale, fmt).scale.detach()  # as models keep them: through their logarithm
        progress("weight scales", number + 1, len(quantized))
    return found


def _by_blocks(weight: Tensor, fmt: IntegerFormat, scale_of: Callable[[Tensor, IntegerFormat], Tensor]) -> Tensor:
    """``scale_of`` some output channels after the other, which changes no bit: their scales do not meet.

    No block has one channel of many: a sum over a single row is shared out among threads in another order.
    """
    blocks = min(math.ceil(weight.numel() / _BLOCK), weight.shape[0] // 2)
    return torch.cat([scale_of(channels, fmt) for channels in weight.tensor_split(max(1, blocks))])
