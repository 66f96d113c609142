from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from s2p_deploy.export import check_graph, export_graph, site_subgraph
from s2p_deploy.export.centres import usable_centres
from s2p_deploy.export.overflow import HALF_RANGE, overflowing_sites
from s2p_deploy.records import CalibratedModel, ExportedGraph, ScaleTable

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SITE = "mid_block.resnets.0.conv1"


def with_wide_column(model: CalibratedModel, low: float, high: float) -> CalibratedModel:
    """The model with one act point whose scales go from ``low`` to ``high``."""
    scales = model.scales.scales.copy()
    scales[:, model.scales.points.index(SITE)] = np.geomspace(low, high, len(scales))
    return replace(model, scales=ScaleTable(scales, model.scales.points, model.scales.trained))


def test_codes_times_weights_times_the_centre_bound_the_result(w8a8: CalibratedModel) -> None:
    """The bound by hand for one site, on both sides of the limit."""
    weight, scale = w8a8.tensor(f"network.{SITE}.weight"), w8a8.weight_scales()[SITE]
    coded = np.clip(np.rint(weight / scale), -128, 127) * scale
    total = np.abs(coded).sum((1, 2, 3)).max()
    limit = HALF_RANGE / (128 * total)
    for factor, found in ((0.99, frozenset()), (1.01, frozenset({SITE}))):
        wide = with_wide_column(w8a8, limit * factor / 4, limit * factor * 4)
        assert overflowing(wide) == found


def test_tiny_models_stay_in_half(w8a8: CalibratedModel, w8a8_half_graph: ExportedGraph) -> None:
    assert overflowing(w8a8) == frozenset()
    assert w8a8_half_graph.manifest.content["full_sites"] == []


def test_a_site_beyond_half_is_computed_in_float(w8a8: CalibratedModel, tmp_path: Path, run_onnx: Callable) -> None:
    """Scales of 0.2 to 4500: their middle is 30, and products are 150 times as large at the first row."""
    wide = with_wide_column(w8a8, 0.2, 4500)
    graph = export_graph(wide, tmp_path / "fp16", dtype="fp16")
    assert graph.manifest.content["full_sites"] == [SITE]
    check_graph(graph.onnx_file, graph.plan)
    part = site_subgraph(graph, SITE)
    entry = part.graph.input[0]
    shape = [2] + [size.dim_value for size in entry.type.tensor_type.shape.dim[1:]]
    given = {
        entry.name: np.random.default_rng(0).standard_normal(shape).astype(np.float16),
        "step_index": np.zeros(2, np.int64),
        "act_scales": wide.scales.scales,
    }
    plain = site_subgraph(export_graph(wide, tmp_path / "fp32"), SITE)
    output = next(site.output for site in graph.sites if site.site == SITE)
    expected = run_onnx(plain, given | {entry.name: given[entry.name].astype(np.float32)})[output]
    found = run_onnx(part, given)[output]
    assert found.dtype == np.float16
    assert np.abs(found - expected).max() < 0.03 * np.abs(expected).max()


def overflowing(model: CalibratedModel) -> frozenset[str]:
    """Needs no graph: sizes from the weights themselves."""
    names = [site.site for site in model.plan.sites if site.act_point is not None]
    weights = {name: model.tensor(f"network.{name}.weight") for name in names}
    sizes = {name: weight.size // len(weight) for name, weight in weights.items()}
    return overflowing_sites(model, sizes, usable_centres(model.scales, "fp16"))
