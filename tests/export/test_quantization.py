"""Codes and scales by hand, and the layers of a half-precision graph that are computed in float32."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from s2p_deploy.errors import InputError
from s2p_deploy.export import Subgraphs, check_graph, export_graph
from s2p_deploy.export.quantization import (
    HALF_RANGE,
    overflowing_layers,
    storage_type,
    usable_reference_scales,
    usable_weight_scale,
    weight_codes,
)
from s2p_deploy.numerics import INT4, INT8
from s2p_deploy.records import CalibratedModel, ExportedGraph, ScaleTable

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LAYER = "mid_block.resnets.0.conv1"


def test_codes_by_hand() -> None:
    weight = np.asarray([[0.5, -0.26, 3.0], [10.0, -20.0, 5.0]], np.float32)
    scale = np.asarray([[0.1], [1.0]], np.float32)
    np.testing.assert_array_equal(weight_codes(weight, scale, INT8), [[5, -3, 30], [10, -20, 5]])
    four = weight_codes(weight, scale, INT4)
    assert four.dtype == ml_dtypes.int4
    np.testing.assert_array_equal(four.astype(np.int8), [[5, -3, 7], [7, -8, 5]])


def test_what_fits_into_four_bits_is_stored_in_four() -> None:
    assert storage_type(INT8) == ir.DataType.INT8
    assert storage_type(INT4) == ir.DataType.INT4


def test_scales_of_zero_channels_stay_above_zero_in_half_precision() -> None:
    scale = np.asarray([1e-19, 0.5], np.float32)
    half = usable_weight_scale(scale, ir.DataType.FLOAT16).astype(np.float16)
    assert half[0] > 0
    assert half[1] == 0.5
    np.testing.assert_array_equal(usable_weight_scale(scale, ir.DataType.FLOAT), scale)


def table(*columns: list[float]) -> ScaleTable:
    return ScaleTable(np.asarray(columns, np.float32).T, tuple("ab"[: len(columns)]), (0,))


def test_reference_scales_are_the_geometric_mean_of_the_ends() -> None:
    assert usable_reference_scales(table([1.0, 2.0, 4.0], [0.5, 0.5, 0.5]), "fp32") == {"a": 2.0, "b": 0.5}


def test_half_reference_scales_are_numbers_of_half_precision() -> None:
    reference_scale = usable_reference_scales(table([0.1, 0.1, 0.1]), "fp16")["a"]
    assert reference_scale == float(np.float16(0.1)) != float(np.float32(0.1))


def test_no_points_have_no_reference_scales() -> None:
    assert usable_reference_scales(ScaleTable(np.ones((3, 0), np.float32), (), ()), "fp16") == {}


@pytest.mark.parametrize("column", [[1e-5, 1e5, 1.0], [1e-6, 1e-6, 1e-6], [1e5, 1e5, 1e5]])
def test_what_half_precision_cannot_hold_is_refused(column: list[float]) -> None:
    usable_reference_scales(table([1.0, 1.0, 1.0], column), "fp32")
    with pytest.raises(
        InputError, match=r"activation quantizer b: its scales .* leave the range of fp16: use --dtype fp32"
    ):
        usable_reference_scales(table([1.0, 1.0, 1.0], column), "fp16")


def with_wide_column(model: CalibratedModel, low: float, high: float) -> CalibratedModel:
    """The model with one activation quantizer whose scales go from ``low`` to ``high``."""
    scales = model.scales.scales.copy()
    scales[:, model.scales.quantizers.index(LAYER)] = np.geomspace(low, high, len(scales))
    return replace(model, scales=ScaleTable(scales, model.scales.quantizers, model.scales.calibrated))


def test_codes_times_weights_times_the_reference_scale_bound_the_result(w8a8: CalibratedModel) -> None:
    """The bound by hand for one layer, on both sides of the limit."""
    weight, scale = w8a8.tensor(f"network.{LAYER}.weight"), w8a8.weight_scales()[LAYER]
    coded = np.clip(np.rint(weight / scale), -128, 127) * scale
    total = np.abs(coded).sum((1, 2, 3)).max()
    limit = HALF_RANGE / (128 * total)
    for factor, found in ((0.99, frozenset()), (1.01, frozenset({LAYER}))):
        wide = with_wide_column(w8a8, limit * factor / 4, limit * factor * 4)
        assert overflowing(wide) == found


def test_tiny_models_stay_in_half(w8a8: CalibratedModel, w8a8_half_graph: ExportedGraph) -> None:
    assert overflowing(w8a8) == frozenset()
    assert w8a8_half_graph.manifest.content["float32_layers"] == []


def test_a_layer_beyond_half_is_computed_in_float(w8a8: CalibratedModel, tmp_path: Path, run_onnx: Callable) -> None:
    """Scales of 0.2 to 4500: their middle is 30, and products are 150 times as large at the first row."""
    wide = with_wide_column(w8a8, 0.2, 4500)
    graph = export_graph(wide, tmp_path / "fp16", dtype="fp16")
    assert graph.manifest.content["float32_layers"] == [LAYER]
    check_graph(graph.onnx_file, graph.plan)
    part = Subgraphs(graph).layer(LAYER)
    entry = part.graph.input[0]
    shape = [2] + [size.dim_value for size in entry.type.tensor_type.shape.dim[1:]]
    given = {
        entry.name: np.random.default_rng(0).standard_normal(shape).astype(np.float16),
        "timestep_index": np.zeros(2, np.int64),
        "act_scales": wide.scales.scales,
    }
    plain = Subgraphs(export_graph(wide, tmp_path / "fp32")).layer(LAYER)
    output = next(layer.output for layer in graph.layers if layer.name == LAYER)
    expected = run_onnx(plain, given | {entry.name: given[entry.name].astype(np.float32)})[output]
    found = run_onnx(part, given)[output]
    assert found.dtype == np.float16
    assert np.abs(found - expected).max() < 0.03 * np.abs(expected).max()


def overflowing(model: CalibratedModel) -> frozenset[str]:
    """Needs no graph: sizes from the weights themselves."""
    names = [layer.name for layer in model.plan.layers if layer.activation_quantizer is not None]
    weights = {name: model.tensor(f"network.{name}.weight") for name in names}
    sizes = {name: weight.size // len(weight) for name, weight in weights.items()}
    return overflowing_layers(model, sizes, usable_reference_scales(model.scales, "fp16"))
