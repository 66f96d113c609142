"""Structure and numbers: a gated layer as two products gives the same values to the bit."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from s2p_deploy.engines.passes.split_linears import SplitLinears
from tests.engines.passes.reference_run import run_reference
from tests.graph_text import graph_from_text

HEAD = """
g (float[batch,3,4] sample, float[batch,1,1] ratio{stored})
  => (float[batch,3,{width}] noise_pred)
"""
QUANTIZED = """
{ w = DequantizeLinear <axis=1> (codes, scales)
  product = MatMul(sample, w)
  scaled = Mul(product, ratio)
  biased = Add(scaled, bias)
  value, gate = Split <axis={axis}, num_outputs=2> (biased)
  active = Sigmoid(gate)
  noise_pred = Mul(value, active) }
"""
FLOATING = """
{ product = MatMul(sample, weight)
  biased = Add(product, bias)
  value, gate = Split <axis={axis}, num_outputs=2> (biased)
  active = Sigmoid(gate)
  noise_pred = Mul(value, active) }
"""
RANDOM = np.random.default_rng(0)
CODES = RANDOM.integers(-8, 8, (4, 6))
CONSTANTS = {
    "scales": RANDOM.uniform(0.5, 2, 6).astype(np.float32),
    "bias": RANDOM.normal(size=6).astype(np.float32),
    "weight": RANDOM.normal(size=(4, 6)).astype(np.float32),
}
INPUTS = {
    "sample": RANDOM.normal(size=(2, 3, 4)).astype(np.float32),
    "ratio": np.asarray([0.5, 3.0], np.float32).reshape(2, 1, 1),
}


DECLARED = {
    "codes": "{codes}[4,6] codes",
    "scales": "float[6] scales",
    "bias": "float[6] bias",
    "weight": "float[4,6] weight",
}
SHAPES = {"product": [2, 3, 6], "scaled": [2, 3, 6], "biased": [2, 3, 6], "w": [4, 6]}


def model_of(body: str, *, axis: int = -1, width: int = 3, codes: ir.DataType = ir.DataType.INT8) -> ir.Model:
    used = [name for name in DECLARED if name in body]
    declared = "".join(f", {DECLARED[name]}" for name in used).replace("{codes}", codes.name.lower())
    text = HEAD.replace("{width}", str(width)).replace("{stored}", declared) + body.replace("{axis}", str(axis))
    stored = CONSTANTS | {"codes": CODES.astype(codes.numpy())}
    model = graph_from_text(text, {name: stored[name] for name in used})
    for node in model.graph:
        node.name = str(node.outputs[0].name)
        for value in node.outputs:
            if value.name in SHAPES:
                value.shape = ir.Shape(SHAPES[str(value.name)])
    return model


@pytest.mark.parametrize("axis", [-1, 2])
@pytest.mark.parametrize(
    ("body", "codes"), [(QUANTIZED, ir.DataType.INT8), (QUANTIZED, ir.DataType.INT4), (FLOATING, ir.DataType.INT8)]
)
def test_two_products_give_the_same_bits(body: str, codes: ir.DataType, axis: int) -> None:
    model = model_of(body, axis=axis, codes=codes)
    before = run_reference(ir.to_proto(model), INPUTS)
    assert SplitLinears()(model).modified
    operators = [node.op_type for node in model.graph]
    assert (operators.count("MatMul"), operators.count("Split")) == (2, 0)
    after = run_reference(ir.to_proto(model), INPUTS)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)


def test_the_first_part_keeps_its_names() -> None:
    model = model_of(QUANTIZED)
    names = {str(node.outputs[0].name) for node in model.graph}
    SplitLinears()(model)
    assert names - {"value"} <= {str(node.outputs[0].name) for node in model.graph}
    kept = model.graph.initializers["codes"].const_value
    assert kept is not None
    assert kept.dtype == ir.DataType.INT8
    np.testing.assert_array_equal(kept.numpy(), CODES[:, :3])
    assert set(model.graph.initializers) == {
        name + suffix for name in ("codes", "scales", "bias") for suffix in ("", "/part1")
    }


@pytest.mark.parametrize(
    "body",
    [
        QUANTIZED.replace("Mul(product, ratio)", "Mul(ratio, product)"),  # not the form that export writes
        FLOATING.replace("Add(product, bias)", "Relu(product)"),
    ],
)
def test_anything_else_stays(body: str) -> None:
    model = model_of(body)
    assert not SplitLinears()(model).modified


def test_a_split_along_another_axis_stays() -> None:
    body = FLOATING.replace("num_outputs=2> (biased)", "num_outputs=2> (both)").replace(
        "  value,", "  both = Concat <axis=1> (biased, biased)\n  value,"
    )
    model = model_of(body, axis=1, width=6)
    assert not SplitLinears()(model).modified


def test_a_result_that_is_read_whole_too_stays() -> None:
    body = QUANTIZED.replace("  value,", "  extra = Relu(biased)\n  value,")
    assert not SplitLinears()(model_of(body)).modified
