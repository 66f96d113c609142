from __future__ import annotations

import math

import pytest
import torch

from s2p_deploy.calib import QuantizedDenoiser
from s2p_deploy.calib.summary import average_bits
from s2p_deploy.families import HotDenoiser, discover_sites
from s2p_deploy.records import ActPoint, PrecisionPlan, SitePlan

TEXT_WIDTH, TOKENS = 128, 10


def test_average_bits_by_hand(hot: HotDenoiser) -> None:
    """conv_in (8x4x3x3) reads 4x8x8 elements, conv_out (4x8x3x3) 8x8x8; everything else stays in floating point."""
    formats = {"conv_in": ("levels3", "conv_in"), "conv_out": ("int4", None)}
    sites = tuple(SitePlan(s.name, s.op, *formats.get(s.name, ("none", None)), "") for s in discover_sites(hot))
    modules = {site.site: hot.network.get_submodule(site.site) for site in sites}
    parameters = sum(module.weight.numel() for module in modules.values())
    scales = {name: torch.ones(len(modules[name].weight), 1, 1, 1) for name in formats}
    plan = PrecisionPlan(sites, (ActPoint("conv_in", "int8", ("conv_in",)),))
    denoiser = QuantizedDenoiser(hot, plan, scales)
    found, longer = average_bits(denoiser, TOKENS), average_bits(denoiser, 2 * TOKENS)
    saved = 288 * (16 - math.log2(3)) + 288 * 12
    assert found["parameters"]["weights"] == pytest.approx(16 - saved / parameters)
    assert found["layers"]["weights"] == pytest.approx(16 - (16 - math.log2(3) + 12) / len(sites))
    assert found["layers"]["activations"] == pytest.approx(16 - 8 / len(sites))
    text_sites = sum(name.endswith(("attn2.to_k", "attn2.to_v")) for name in modules)
    elements = [8 * 4 * 64 / (16 - bits["input_elements"]["activations"]) for bits in (found, longer)]
    assert elements[1] - elements[0] == pytest.approx(text_sites * TOKENS * TEXT_WIDTH, rel=1e-4)
    assert found["floating_point"] == 16
