from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest
from graph_text import graph_from_text

from s2p_deploy.export.passes.hoisted_text import HoistedText

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# keys with a low-rank branch, values with smoothing, a bias and a DequantizeLinear, and a product of the latents
GRAPH = """
g (float[batch,2,4] sample, float[batch,2,3] encoder_hidden_states, float[3,4] key, float[3,1] down, float[1,4] up,
   float[3] factor, int8[3,4] codes, float scale, float[4] bias, float[4,4] own, int64[4] heads)
  => (float[batch,2,2,2] out) {
    residual = MatMul(encoder_hidden_states, key)
    low = MatMul(encoder_hidden_states, down)
    branch = MatMul(low, up)
    k = Add(residual, branch)
    smooth = Div(encoder_hidden_states, factor)
    value = DequantizeLinear(codes, scale)
    product = MatMul(smooth, value)
    v = Add(product, bias)
    query = MatMul(sample, own)
    mixed = Mul(query, k)
    sum = Add(mixed, v)
    out = Reshape(sum, heads)
}
"""
RANDOM = np.random.default_rng(0)
STORED = {
    name: RANDOM.standard_normal(shape).astype(np.float32)
    for name, shape in {"key": (3, 4), "down": (3, 1), "up": (1, 4), "bias": (4,), "own": (4, 4)}.items()
} | {
    "factor": np.float32([2, 4, 8]),
    "codes": RANDOM.integers(-127, 128, (3, 4)).astype(np.int8),
    "scale": np.float32(0.01),
    "heads": np.asarray([0, 2, 2, 2]),
}
VALUES = {
    "sample": RANDOM.standard_normal((3, 2, 4)).astype(np.float32),
    "encoder_hidden_states": RANDOM.standard_normal((3, 2, 3)).astype(np.float32),
}
OF_TEXT = {"residual", "low", "branch", "product"}


def traced(body: str = GRAPH, stored: Mapping[str, np.ndarray] = STORED) -> ir.Model:
    model = graph_from_text(body, stored)
    for node in model.graph:
        node.name = node.outputs[0].name
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        if node.name in {"k", "v"}:  # of others nobody asks
            node.outputs[0].shape = ir.Shape(["batch", 2, 4])
    return model


def products(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "MatMul"]


def divided() -> tuple[ir.Model, HoistedText]:
    model = traced()
    hoisted = HoistedText(products(model))
    hoisted(model)
    return model, hoisted


def test_what_reads_the_text_alone_is_in_the_other_graph() -> None:
    model, hoisted = divided()
    assert [node.op_type for node in model.graph] == ["Split", "MatMul", "Mul", "Add", "Reshape"]
    assert [value.name for value in model.graph.inputs] == ["sample", "text_projections"]
    assert list(model.graph.initializers) == ["own", "heads", "text_projections/sizes"]
    assert {node.name for node in hoisted.moved if node.op_type == "MatMul"} == OF_TEXT
    text = hoisted.text_graph
    assert text is not None
    assert [value.name for value in text.graph.inputs] == ["encoder_hidden_states"]
    before = [name for name in traced().graph.initializers if name not in {"own", "heads"}]
    assert list(text.graph.initializers) == before, "the same files in every run"


def test_sums_move_with_their_products_and_keep_their_names() -> None:
    model, hoisted = divided()
    assert [value.name for value in hoisted.columns] == ["k", "v"]
    assert [value.name for value in model.graph.node(0).outputs] == ["k", "v"]
    assert hoisted.text_graph is not None
    (joined,) = hoisted.text_graph.graph.outputs
    assert [value.name for value in joined.producer().inputs] == ["k", "v"]
    assert list(joined.shape) == ["batch", 2, 8]


def test_both_graphs_together_compute_what_one_computed(run_onnx: Callable) -> None:
    expected = run_onnx(ir.to_proto(traced()), VALUES)["out"]
    model, hoisted = divided()
    projections = run_onnx(ir.to_proto(hoisted.text_graph), VALUES)
    np.testing.assert_array_equal(run_onnx(ir.to_proto(model), VALUES | projections)["out"], expected)


def test_a_weight_that_both_graphs_read_is_in_both(run_onnx: Callable) -> None:
    shared = GRAPH.replace("query = MatMul(sample, own)", "wide = MatMul(sample, own)\n query = Mul(wide, bias)")
    expected = run_onnx(ir.to_proto(traced(shared)), VALUES)["out"]
    model = traced(shared)
    hoisted = HoistedText(products(model))
    hoisted(model)
    projections = run_onnx(ir.to_proto(hoisted.text_graph), VALUES)
    np.testing.assert_array_equal(run_onnx(ir.to_proto(model), VALUES | projections)["out"], expected)


def with_lora_inputs() -> str:
    """The keys' branch reads inputs of LoRAs, and the gate that it shares with a branch of the queries."""
    body = GRAPH.replace(" float[3,1] down, float[1,4] up,\n", "\n").replace(
        "encoder_hidden_states, float[3,4] key",
        "encoder_hidden_states, float[3] lora_down, float[4] lora_up, float[batch,1] lora_strengths, float[3,4] key,"
        " int64[1] axes, int64[2] wide, int64[2] long",
    )
    body = body.replace(
        "    residual =",
        "    gate = Unsqueeze(lora_strengths, axes)\n    down = Reshape(lora_down, wide)\n"
        "    up = Reshape(lora_up, long)\n    residual =",
    )
    body = body.replace("branch = MatMul(low, up)", "gated = Mul(low, gate)\n    branch = MatMul(gated, up)")
    return body.replace("query = MatMul(sample, own)", "plain = MatMul(sample, own)\n    query = Mul(plain, gate)")


def test_branches_take_the_inputs_of_loras_along_and_leave_shared_gates(run_onnx: Callable) -> None:
    random = np.random.default_rng(1)
    given = VALUES | {
        name: random.standard_normal(shape).astype(np.float32)
        for name, shape in {"lora_down": 3, "lora_up": 4, "lora_strengths": (3, 1)}.items()
    }
    stored = STORED | {"axes": np.asarray([1]), "wide": np.asarray([3, 1]), "long": np.asarray([1, 4])}
    model = traced(with_lora_inputs(), stored)
    expected = run_onnx(ir.to_proto(model), given)["out"]
    hoisted = HoistedText([node for node in model.graph if node.op_type == "MatMul" or node.name == "k"])
    hoisted(model)
    loras = ["lora_down", "lora_up", "lora_strengths"]
    assert [value.name for value in model.graph.inputs] == ["sample", "text_projections", *loras]
    assert [node.name for node in model.graph if node.name in {"gate", "down", "up", "branch"}] == ["gate"]
    assert hoisted.text_graph is not None
    assert [value.name for value in hoisted.text_graph.graph.inputs] == ["encoder_hidden_states", *loras]
    assert [value.name for value in hoisted.columns] == ["k", "v"], "no gate and no matrix"
    projections = run_onnx(ir.to_proto(hoisted.text_graph), given)
    np.testing.assert_array_equal(run_onnx(ir.to_proto(model), given | projections)["out"], expected)


def test_a_graph_without_products_of_the_text_is_refused() -> None:
    model = traced()
    latents = [node for node in products(model) if node.name == "query"]
    with pytest.raises(ir.passes.PreconditionError, match="no product reads"):
        HoistedText(latents)(model)


def test_a_text_that_is_read_otherwise_too_is_an_error() -> None:
    model = traced(
        GRAPH.replace("mixed = Mul(query, k)", "sized = Shape(encoder_hidden_states)\n mixed = Mul(query, k)")
    )
    with pytest.raises(ir.passes.PostconditionError, match="sized still reads"):
        HoistedText(products(model))(model)
