from __future__ import annotations

import pytest
import torch

from s2p_deploy.calib import QuantizedDenoiser
from s2p_deploy.calib.model_files import average_bits
from s2p_deploy.families import IndexedDenoiser, discover_layers
from s2p_deploy.records import ActivationQuantizer, LayerPlan, PrecisionPlan

TEXT_WIDTH, TOKENS = 128, 10


def test_average_bits_by_hand(float_denoiser: IndexedDenoiser) -> None:
    """conv_in (8x4x3x3) reads 4x8x8 elements, conv_out (4x8x3x3) 8x8x8; everything else stays in floating point."""
    formats = {"conv_in": ("int8", "conv_in"), "conv_out": ("int4", None)}
    layers = tuple(
        LayerPlan(s.name, s.op, *formats.get(s.name, ("none", None)), "") for s in discover_layers(float_denoiser)
    )
    modules = {layer.name: float_denoiser.network.get_submodule(layer.name) for layer in layers}
    parameters = sum(module.weight.numel() for module in modules.values())
    scales = {name: torch.ones(len(modules[name].weight), 1, 1, 1) for name in formats}
    plan = PrecisionPlan(layers, (ActivationQuantizer("conv_in", "int8", ("conv_in",)),))
    denoiser = QuantizedDenoiser(float_denoiser, plan, scales)
    found, longer = average_bits(denoiser, TOKENS), average_bits(denoiser, 2 * TOKENS)
    saved = 288 * 8 + 288 * 12
    assert found["parameters"]["weights"] == pytest.approx(16 - saved / parameters)
    assert found["layers"]["weights"] == pytest.approx(16 - (8 + 12) / len(layers))
    assert found["layers"]["activations"] == pytest.approx(16 - 8 / len(layers))
    text_layers = sum(name.endswith(("attn2.to_k", "attn2.to_v")) for name in modules)
    elements = [8 * 4 * 64 / (16 - bits["input_elements"]["activations"]) for bits in (found, longer)]
    assert elements[1] - elements[0] == pytest.approx(text_layers * TOKENS * TEXT_WIDTH, rel=1e-4)
    assert found["floating_point"] == 16
