"""How large a denoiser is once it is deployed: counted, because packed engines of every format do not exist."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from s2p_deploy.numerics import format_by_name

if TYPE_CHECKING:
    import torch

    from s2p_deploy.records import CalibratedModel

_FLOAT_BYTES = 2  # what stays in floating point is deployed in half precision
_SCALE_BYTES = 4


def quantized_bytes(calibrated: CalibratedModel) -> int:
    """Weights in their format's bits, the rest and the time table, if any, in half precision, scales in float32.

    Activation scales count on the calibrated rows only: the others follow from them.
    """
    bits = {f"network.{site.site}.weight": format_by_name(site.weights) for site in calibrated.plan.sites}
    total = 0.0
    for name, value in calibrated.weights().items():
        fmt = bits.get(name)
        total += value.size * (_FLOAT_BYTES if fmt is None else fmt.bits / 8)
    scales = sum(scale.size for scale in calibrated.weight_scales().values())
    scales += len(calibrated.scales.trained) * len(calibrated.scales.points)
    table = 0 if calibrated.added_width else calibrated.time_table().projections.size
    return math.ceil(total) + scales * _SCALE_BYTES + table * _FLOAT_BYTES


def float_bytes(denoiser: torch.nn.Module) -> int:
    """All parameters in half precision."""
    return sum(parameter.numel() for parameter in denoiser.parameters()) * _FLOAT_BYTES
