from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
from graph_text import graph_from_text

from s2p_deploy.export.passes.weights import DirectWeights, HalfStorage, StoredWeights
from s2p_deploy.export.regions import LayerNode
from s2p_deploy.records import LayerPlan

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PLAIN = """
g (
    float[batch,2] sample, float[3,2] network__fc__weight, float[3] network__fc__bias, float three
) => (float[batch,3] out) {
    turned = Transpose <perm: ints = [1, 0]> (network__fc__weight)
    a = MatMul(sample, turned)
    b = Mul(a, three)
    out = Add(b, network__fc__bias)
}
"""


def test_parameters_get_data_matrices_turn_and_constants_stay() -> None:
    matrix, bias = np.arange(6, dtype=np.float32).reshape(3, 2), np.ones(3, np.float32)
    weights = {"network.fc.weight": matrix, "network.fc.bias": bias}
    stored = {"network__fc__weight": None, "network__fc__bias": None, "three": np.asarray(3, np.float32)}
    model = graph_from_text(PLAIN, stored)
    graph = model.graph
    direct = DirectWeights()
    direct(model)
    assert graph.initializers["fc.weight"].const_value is None, "no data before layers are located"
    StoredWeights(direct.keys, weights.__getitem__, ir.DataType.FLOAT16)(model)
    assert [node.op_type for node in graph] == ["MatMul", "Mul", "Add"]
    assert set(graph.initializers) == {"fc.weight", "fc.bias", "three"}
    weight = graph.initializers["fc.weight"].const_value
    assert weight is not None
    assert weight.dtype == ir.DataType.FLOAT16
    np.testing.assert_array_equal(weight.numpy(), matrix.T)
    assert graph.node(0).inputs[1] is graph.initializers["fc.weight"]


QUANTIZED = """
g (float[1,1,1,2] sample, float[2,1,1,1] network__conv__weight, float[2,2] network__fc__weight) => (
    float[1,2,1,2] out
) {
    a = Conv(sample, network__conv__weight)
    turned = Transpose <perm: ints = [1, 0]> (network__fc__weight)
    out = MatMul(a, turned)
}
"""


def test_both_kinds_of_weights_come_out_on_their_grids(run_onnx: Callable) -> None:
    conv = np.asarray([0.24, -3.0], np.float32).reshape(2, 1, 1, 1)
    linear = np.asarray([[1.0, 2.2], [-9.0, 30.0]], np.float32)  # [out, in]
    weights = {"network.conv.weight": conv, "network.fc.weight": linear}
    scales = {
        "conv": np.asarray([0.1, 1.0], np.float32).reshape(2, 1, 1, 1),
        "fc": np.asarray([[1.0], [2.0]], np.float32),
    }
    model = graph_from_text(QUANTIZED, {"network__conv__weight": None, "network__fc__weight": None})
    direct = DirectWeights()
    direct(model)
    ops = {"conv": ("conv", "int8"), "fc": ("linear", "int4")}
    layers = tuple(
        LayerNode(LayerPlan(name, op, kind, None, ""), node, None)
        for (name, (op, kind)), node in zip(ops.items(), model.graph, strict=True)
    )
    StoredWeights(direct.keys, weights.__getitem__, ir.DataType.FLOAT, layers, scales)(model)
    assert set(model.graph.initializers) == {
        f"{layer}/weight_quantizer/{part}" for layer in ("conv", "fc") for part in ("codes", "scale")
    }
    found = run_onnx(ir.to_proto(model), {"sample": np.asarray([[[[1.0, 10.0]]]], np.float32)})["out"]
    # conv: 0.2 and -3; linear: rows of [out, in] are [1, 2] and [2 * -4.5 -> -8 (half to even of -4.5 is -4), 2 * 7]
    signal = np.asarray([[1.0, 10.0]]) * np.asarray([[0.2], [-3.0]])
    np.testing.assert_allclose(found[0, :, 0], signal @ np.asarray([[1.0, 2.0], [-8.0, 14.0]]).T, rtol=1e-6)


WIDE = """
g (
    float[rows,32] given, float[32,32] weight, float[32] bias, int64[1024] whole
) => (float[rows,32] out, int64[1024] same) {
    a = MatMul(given, weight)
    b = MatMul(a, weight)
    out = Add(b, bias)
    same = Identity(whole)
}
"""
RANDOM = np.random.default_rng(0)
STORED = {
    "weight": RANDOM.standard_normal((32, 32)).astype(np.float32),
    "bias": RANDOM.standard_normal(32).astype(np.float32),
    "whole": np.arange(1024),
}


def halved() -> ir.Model:
    model = graph_from_text(WIDE, STORED)
    HalfStorage()(model)
    return model


def test_large_matrices_are_stored_in_half_and_nothing_else_is() -> None:
    graph = halved().graph
    types = {name: value.dtype for name, value in graph.initializers.items()}
    assert types == {
        "weight/half": ir.DataType.FLOAT16,
        "bias": ir.DataType.FLOAT,
        "whole": ir.DataType.INT64,
    }
    assert [node.op_type for node in graph].count("Cast") == 1, "one for both readers"
    stored = graph.initializers["weight/half"].const_value
    assert stored is not None
    np.testing.assert_array_equal(stored.numpy(), STORED["weight"].astype(np.float16))


def test_arithmetic_stays_in_full_precision(run_onnx: Callable) -> None:
    model = ir.to_proto(halved())
    onnx.checker.check_model(model, full_check=True)
    given = RANDOM.standard_normal((3, 32)).astype(np.float32)
    rounded = STORED["weight"].astype(np.float16).astype(np.float32)
    found = run_onnx(model, {"given": given})["out"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, given @ rounded @ rounded + STORED["bias"], rtol=1e-5, atol=1e-5)
    half = (given.astype(np.float16) @ rounded.astype(np.float16)).astype(np.float32) @ rounded + STORED["bias"]
    assert np.abs(found - half).max() > 1e-3, "half arithmetic would be seen"


def test_the_file_holds_half_as_much(tmp_path: Path) -> None:
    ir.save(halved(), tmp_path / "half.onnx")
    ir.save(graph_from_text(WIDE, STORED), tmp_path / "full.onnx")
    saved = (tmp_path / "full.onnx").stat().st_size - (tmp_path / "half.onnx").stat().st_size
    assert saved > 0.9 * STORED["weight"].nbytes / 2


def test_a_second_time_changes_nothing() -> None:
    model = halved()
    assert not HalfStorage()(model).modified
    assert len(model.graph.initializers) == 3
