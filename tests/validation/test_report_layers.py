from __future__ import annotations

from typing import Any

import pytest

from s2p_deploy.records import ActPoint, PrecisionPlan, SitePlan
from s2p_deploy.validation.report_layers import Group, Layer, groups_of, layers_of

SITES = (
    SitePlan("conv_in", "conv", "int8", None, "rule 1"),
    SitePlan("down_blocks.0.attn.to_q", "linear", "int4", "down_blocks.0.attn.to_q", "rule 2"),
    SitePlan("down_blocks.0.attn.to_k", "linear", "int4", "down_blocks.0.attn.to_q", "rule 2"),
    SitePlan("mid_block.conv", "conv", "none", None, "rule 3"),
)
POINT = ActPoint("down_blocks.0.attn.to_q", "int8", ("down_blocks.0.attn.to_q", "down_blocks.0.attn.to_k"))


def layers(*sensitivities: float | None, **changes: object) -> list[Layer]:
    sites = tuple(
        SitePlan(s.site, s.op, s.weights, s.act_point, s.rule, value)
        for s, value in zip(SITES, sensitivities or [None] * 4, strict=True)
    )
    data: dict[str, Any] = {
        "engine": {"sites": [{"site": "conv_in", "weight_storage_bits": 8, "lowering": "rescale", "compute": "int8"}]},
        "graph_numbers": {"points": [{"point": POINT.name, "mismatch": 0.25, "max_lsb": 1, "n": 4}]},
        "engine_numbers": {"sites": [{"site": "conv_in", "sqnr": 61.5, "quantization": 40.0, "n": 8}]},
    }
    return layers_of(data | changes, PrecisionPlan(sites, (POINT,)), ())


def test_a_layer_gathers_what_is_known_of_its_site_and_its_act_point() -> None:
    first, query, key, last = layers()
    assert (first.stored_bits, first.compute, first.sqnr, first.activations) == (8, "int8", 61.5, "none")
    assert (query.mismatch, query.max_lsb, query.activations) == (0.25, 1, "int8")
    assert key.mismatch == 0.25  # sites that read one tensor share its codes
    assert (last.stored_bits, last.compute, last.sqnr, last.mismatch) == (None, "", None, None)


def test_what_was_not_measured_is_none() -> None:
    gone = {"skipped": "it needs a GPU"}
    found = layers(graph_numbers={"points": gone}, engine_numbers={"sites": gone})
    assert {(layer.mismatch, layer.sqnr) for layer in found} == {(None, None)}


def test_bars_are_logarithmic_from_the_least_to_the_most_sensitive() -> None:
    bars = [layer.bar for layer in layers(1e-4, 1e-2, None, 1.0)]
    assert bars == [pytest.approx(0.04), pytest.approx(0.52), None, pytest.approx(1.0)]
    assert [layer.bar for layer in layers(0.0, 0.0, 0.0, 0.0)] == [0.04] * 4
    assert [layer.bar for layer in layers(0.0, 1.0, 1.0, 1.0)] == [0.04] * 4  # none stands out above another
    assert {layer.bar for layer in layers()} == {None}


def test_neighbours_of_one_part_are_a_group() -> None:
    assert groups_of(layers()) == [Group("conv_in", 1), Group("down_blocks.0", 2), Group("mid_block", 1)]
