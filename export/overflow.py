"""Which sites could leave the range of FP16 in the rescaled domain, by a bound that holds for any input."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from s2p_deploy.export.scopes import parameter_name
from s2p_deploy.export.weight_codes import weight_codes
from s2p_deploy.numerics import format_by_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from s2p_deploy.records import CalibratedModel, SitePlan

# The largest FP16 number, less 1 %: c and the weights are rounded to FP16, and so is the sum.
HALF_RANGE = 65504 * 0.99


def overflowing_sites(
    calibrated: CalibratedModel, sizes: Mapping[str, int], centres: Mapping[str, float]
) -> frozenset[str]:
    """Sites whose product may overflow FP16. Weights are read one at a time, and only where their scales leave doubt.

    ``sizes`` is the number of weights per output channel of every site, ``centres`` c of every act point.

    The product of codes |q| <= -qmin, the point's constant c and weights w is at most

        -qmin * c * max over output channels of sum |w|

    whatever the input and the row: values before the multiplication by s/c do not depend on s.
    """
    scales = calibrated.weight_scales()
    found = set()
    for site in (site for site in calibrated.plan.sites if site.act_point is not None):
        name, point = site.site, calibrated.plan.point(str(site.act_point))
        fmt = format_by_name(point.activations)
        assert fmt is not None  # an act point has a format
        largest = HALF_RANGE / (-fmt.qmin * centres[point.name])
        if name in scales and _sum_at_most(site, sizes[name], scales[name]) <= largest:
            continue
        weight = calibrated.tensor(parameter_name(f"{name}.weight"))
        if _largest_sum(weight, site, scales.get(name)) > largest:
            found.add(name)
    return frozenset(found)


def _sum_at_most(plan: SitePlan, size: int, scale: NDArray[np.float32]) -> float:
    """What sum |w| of a channel cannot exceed, from the number of weights and their scales alone."""
    fmt = format_by_name(plan.weights)
    assert fmt is not None  # it has scales
    return size * max(-fmt.qmin, fmt.qmax) * float(scale.max())


def _largest_sum(weight: NDArray[np.float32], plan: SitePlan, scale: NDArray[np.float32] | None) -> float:
    """Largest sum |w| over the output channels of a weight [out, ...], as the graph has it: coded by ``scale``."""
    fmt = format_by_name(plan.weights)
    values = weight
    if fmt is not None and scale is not None:
        codes = weight_codes(weight, scale, fmt).astype(np.float32)
        values = codes * scale.reshape(-1, *(1,) * (weight.ndim - 1))
    return float(np.abs(values).reshape(len(values), -1).sum(1, dtype=np.float64).max())
