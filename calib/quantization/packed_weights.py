"""Weights of a finished denoiser as integer codes, several to a byte."""

from __future__ import annotations

from typing import TYPE_CHECKING

from s2p_deploy.numerics import codes_per_byte, format_by_name, pack_codes, quantize
from s2p_deploy.records import PackedWeight

if TYPE_CHECKING:
    from s2p_deploy.calib.quantized_denoiser import QuantizedDenoiser


def packed_weights(denoiser: QuantizedDenoiser) -> dict[str, PackedWeight]:
    """The weights whose codes share bytes (INT4 and the balanced formats), by site, from the denoiser's own scales.

    Codes times scale is what the denoiser computes with, so nothing is lost that a stored model needs.
    """
    scales = denoiser.weight_scales()
    found = {}
    for site in denoiser.plan.sites:
        fmt = format_by_name(site.weights)
        if fmt is None or codes_per_byte(fmt) < 2:
            continue
        weight = denoiser.site(site.site).get_parameter("weight").detach()
        codes = pack_codes(quantize(weight, scales[site.site], fmt), fmt)
        found[site.site] = PackedWeight(codes.numpy(), tuple(weight.shape), fmt.name)
    return found
