"""Structure and numbers of the expansion."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from s2p_deploy.engines.lowerings import weight_only, weight_only_or_matmul
from s2p_deploy.engines.onnx_files import write_onnx
from s2p_deploy.engines.passes.expand_int4 import ExpandInt4, Int4Use
from tests.engines.small_graph import read_back, small_inputs, small_model, small_scales


def codes(model: ir.Model, layer: str) -> ir.TensorProtocol:
    tensor = model.graph.initializers[f"{layer}/weight_quantizer/codes"].const_value
    assert tensor is not None
    return tensor


@pytest.mark.parametrize(
    ("keep", "kinds"),
    [
        (weight_only, {"conv_in": "INT4", "conv": "INT8", "to_q": "INT8"}),
        (weight_only_or_matmul, {"conv_in": "INT4", "conv": "INT8", "to_q": "INT4"}),
        (lambda _use: False, {"conv_in": "INT8", "conv": "INT8", "to_q": "INT8"}),
        (lambda _use: True, {"conv_in": "INT4", "conv": "INT4", "to_q": "INT4"}),
    ],
)
def test_each_backend_keeps_what_it_can_use_packed(keep: object, kinds: dict[str, str]) -> None:
    model = ir.from_proto(small_model(weights="int4"))
    result = ExpandInt4(keep)(model)  # type: ignore[arg-type]
    assert {layer: codes(model, layer).dtype.name for layer in kinds} == kinds
    assert result.modified is ("INT8" in kinds.values())


def test_uses_are_told_apart_by_operator_and_activation() -> None:
    seen: list[Int4Use] = []
    ExpandInt4(lambda use: seen.append(use) or True)(ir.from_proto(small_model(weights="int4")))
    assert set(seen) == {Int4Use("Conv", False), Int4Use("Conv", True), Int4Use("MatMul", True)}


def test_codes_and_results_do_not_change(tmp_path: Path) -> None:
    model = ir.from_proto(small_model(weights="int4"))
    before = codes(model, "to_q").numpy().astype(np.int8)
    write_onnx(model, tmp_path / "packed.onnx")
    ExpandInt4(weight_only)(model)
    write_onnx(model, tmp_path / "expanded.onnx")
    stored = codes(read_back(tmp_path / "expanded.onnx"), "to_q")
    assert stored.dtype == ir.DataType.INT8
    assert np.array_equal(stored.numpy(), before)
    assert before.min() >= -8
    assert before.max() <= 7
    results = []
    for name in ("packed", "expanded"):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(str(tmp_path / f"{name}.onnx"), options)
        results.append(session.run(None, small_inputs() | {"act_scales": small_scales()})[0])
    assert np.array_equal(*results)


def test_an_int8_graph_is_left_alone() -> None:
    model = ir.from_proto(small_model(weights="int8"))
    assert not ExpandInt4(weight_only)(model).modified


def test_an_int4_weight_that_nothing_dequantizes_is_refused() -> None:
    model = ir.from_proto(small_model(weights="int4"))
    weight = model.graph.initializers["to_q/weight_quantizer/codes"]
    model.graph.append(ir.node("Cast", [weight], {"to": ir.DataType.INT8.value}))
    with pytest.raises(ir.passes.PreconditionError, match="read by a Cast"):
        ExpandInt4(weight_only)(model)
