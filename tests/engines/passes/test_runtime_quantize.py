"""Structure and numbers of the lowering ``runtime_q``."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from s2p_deploy.engines.passes.runtime_quantize import RuntimeQuantize
from tests.engines.passes.reference_run import run_reference
from tests.engines.small_graph import REFERENCE_SCALE, small_inputs, small_model, small_scales

COLUMNS = {"conv/codes": 0, "to_q/codes": 1}


def one_row(row: int, dtype: str = "fp32") -> dict[str, np.ndarray]:
    given = small_inputs(dtype=dtype) | {"act_scales": small_scales()}
    return given | {"timestep_index": np.full(3, row)}


@pytest.mark.parametrize("row", [1, 501, 981])
@pytest.mark.parametrize("chosen", [COLUMNS, {"to_q/codes": 1}])
def test_results_are_those_of_rescale_on_any_one_row(chosen: dict[str, int], row: int) -> None:
    model = ir.from_proto(small_model())
    assert RuntimeQuantize(chosen)(model).modified
    found = run_reference(ir.to_proto(model), one_row(row))["noise_pred"]
    expected = run_reference(small_model(), one_row(row))["noise_pred"]
    # x/s and x·(c/s)/c round apart: single codes may differ by one
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
    assert np.median(np.abs(found - expected)) < 1e-5 * np.abs(expected).max()


def test_half_graphs_quantize_by_a_half() -> None:
    model = ir.from_proto(small_model("fp16"))
    RuntimeQuantize(COLUMNS)(model)
    found = run_reference(ir.to_proto(model), one_row(981, "fp16"))["noise_pred"].astype(np.float64)
    expected = run_reference(small_model(), one_row(981))["noise_pred"]
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_the_first_samples_row_quantizes_and_dequantizers_keep_constants() -> None:
    model = ir.from_proto(small_model())
    RuntimeQuantize(COLUMNS)(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    nodes = {str(node.name): node for node in model.graph}
    for layer in ("conv", "to_q"):
        assert f"{layer}/scaled" not in nodes
        quantize = nodes[f"{layer}/input_quantizer/QuantizeLinear"]
        assert quantize.inputs[0].name == {"conv": "x", "to_q": "tokens"}[layer]
        assert not quantize.inputs[1].is_initializer()
        assert nodes[f"{layer}/input_quantizer/DequantizeLinear"].inputs[1].const_value.numpy() == np.float32(
            REFERENCE_SCALE
        )
        assert f"{layer}/rescaled" in nodes
    model.graph.outputs.append(nodes["conv/input_quantizer/QuantizeLinear"].inputs[1])
    given = small_inputs() | {"act_scales": small_scales(), "timestep_index": np.asarray([981, 1, 1])}
    scale = run_reference(ir.to_proto(model), given)["conv/codes/scale"]
    assert scale == small_scales()[981, 0]
    assert scale.shape == ()


def test_bounds_of_a_clip_follow_the_scale() -> None:
    """Four bits: the clip goes to s times the format's ends."""
    proto = small_model()
    quantize = next(node for node in proto.graph.node if node.name == "conv/input_quantizer/QuantizeLinear")
    ends = [
        onnx.numpy_helper.from_array(np.float32(REFERENCE_SCALE * end), name)
        for name, end in (("low", -8), ("high", 7))
    ]
    proto.graph.initializer.extend(ends)
    at = list(proto.graph.node).index(quantize)
    proto.graph.node.insert(at, onnx.helper.make_node("Clip", ["conv/scaled", "low", "high"], ["clipped"], "clip"))
    quantize.input[0] = "clipped"
    proto.graph.output.append(onnx.helper.make_tensor_value_info("conv/codes", onnx.TensorProto.INT8, None))
    model = ir.from_proto(proto)
    RuntimeQuantize(COLUMNS)(model)
    found, expected = (run_reference(m, one_row(981))["conv/codes"] for m in (ir.to_proto(model), proto))
    assert (found.min(), found.max()) == (-8, 7)
    assert (found != expected).mean() < 1e-3


def test_no_points_change_nothing() -> None:
    assert not RuntimeQuantize({})(ir.from_proto(small_model())).modified
