"""Structure and numbers of padded heads."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from s2p_deploy.engines.passes.padded_heads import PaddedHeads
from s2p_deploy.engines.passes.scaled_queries import ScaledQueries
from tests.engines.passes.attention_graph import HEADS, WIDTH, attention, inputs
from tests.engines.passes.reference_run import run_reference

LONG = 512


def test_long_attention_gets_wider_heads_and_the_same_numbers() -> None:
    model = attention(LONG)
    expected = run_reference(ir.to_proto(model), inputs(LONG))["y"]
    assert PaddedHeads()(model).modified
    kinds = [node.op_type for node in model.graph]
    assert (kinds.count("Pad"), kinds.count("Slice")) == (2, 0)
    proto = ir.to_proto(model)
    np.testing.assert_allclose(run_reference(proto, inputs(LONG))["y"], expected, rtol=1e-5, atol=1e-6)
    shapes = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True).graph.value_info
    widths = {one.name: [size.dim_value for size in one.type.tensor_type.shape.dim][1:] for one in shapes}
    assert widths["qh"] == [2, 5, 32]
    assert widths["kt"] == [2, 32, LONG]
    assert widths["mixed"] == [2, 5, 3]


def test_a_second_pass_finds_nothing_to_do() -> None:
    model = attention(LONG)
    PaddedHeads()(model)
    assert not PaddedHeads()(model).modified


@pytest.mark.parametrize("answered", [4, LONG - 1])
def test_short_attention_stays(answered: int) -> None:
    model = attention(answered)
    assert not PaddedHeads()(model).modified


def test_an_open_number_of_tokens_is_taken_for_long() -> None:
    assert PaddedHeads()(attention(-1)).modified


def test_openvino_still_fuses_it_with_scaled_queries_too() -> None:
    """Products and softmax stay in one compiled subgraph."""
    import openvino

    model = attention(LONG)
    PaddedHeads()(model)
    ScaledQueries()(model)
    read = openvino.Core().read_model(model=ir.to_proto(model).SerializeToString())
    read.reshape({name: list(value.shape) for name, value in inputs(LONG).items()})
    compiled = openvino.Core().compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    layers = [str(op.get_rt_info()["layerType"].astype(str)) for op in compiled.get_runtime_model().get_ordered_ops()]
    assert "Subgraph" in layers
    assert not {"MatMul", "Softmax", "FullyConnected"} & set(layers)


@pytest.mark.parametrize(("size", "padded"), [("", True), ("tokens", False), ("600", True), ("24", False)])
def test_a_number_of_tokens_that_a_reshape_copies_is_the_keys_own(size: str, padded: bool) -> None:
    """An open number of the latents' positions has no name and counts as long; the text's has one, and is short."""
    model = attention(LONG)
    answered = model.graph.initializers["answered"]
    answered.const_value = ir.tensor(np.asarray([0, 0, HEADS, WIDTH]), name="answered")
    for name in ("k", "v"):
        keys = next(value for value in model.graph.inputs if value.name == name)
        keys.shape = ir.Shape(["batch", int(size) if size.isdigit() else size or None, HEADS * WIDTH])
    assert PaddedHeads()(model).modified is padded
