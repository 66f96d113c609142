from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from graph_text import graph_from_text

from s2p_deploy.errors import GraphContractError
from s2p_deploy.export.lowering.rescale import lower_rescale
from s2p_deploy.export.passes.gather_scales import GatherScales, QuantizerSpec
from s2p_deploy.export.regions import LayerNode
from s2p_deploy.numerics import INT4, INT8, fake_quantize
from s2p_deploy.records import LayerPlan

if TYPE_CHECKING:
    from collections.abc import Callable

    from s2p_deploy.numerics import IntegerFormat

# A convolution whose result a MatMul without bias reads; the weights are on no grid, only activations are quantized.
GRAPH = """
g (
    float[batch,2,4,4] sample, int64[batch] timestep_index, float[batch,1,2] encoder_hidden_states,
    float[3,2,3,3] w, float[3] b, float[4,5] m
) => (float[batch,3,4,5] noise_pred) {
    y = Conv <pads: ints = [1, 1, 1, 1]> (sample, w, b)
    noise_pred = MatMul(y, m)
}
"""
SCALES = np.asarray([[0.02, 0.3], [0.05, 0.05], [0.1, 0.2]], np.float32)
REFERENCE_SCALES = (0.04, 0.1)


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(3)
    shapes = {"w": (3, 2, 3, 3), "b": (3,), "m": (4, 5)}
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def lowered(weights: dict[str, np.ndarray], fmt: IntegerFormat) -> onnx.ModelProto:
    model = graph_from_text(GRAPH, weights)
    graph = model.graph
    conv, matmul = graph
    conv.outputs[0].shape = ir.Shape(["batch", 3, 4, 4])
    conv.outputs[0].type = matmul.outputs[0].type
    rows = GatherScales(
        tuple(QuantizerSpec(n, c, 4) for n, c in zip(("conv", "mm"), REFERENCE_SCALES, strict=True)),
        3,
        ir.DataType.FLOAT,
    )
    rows(model)
    for name, node in (("conv", conv), ("mm", matmul)):
        op = "conv" if name == "conv" else "linear"
        lower_rescale(
            graph, name, fmt, [LayerNode(LayerPlan(name, op, "none", name, ""), node, None)], rows.scales[name]
        )
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return proto


@pytest.mark.parametrize("fmt", [INT8, INT4])
def test_two_lowered_layers_equal_fake_quantize(
    fmt: IntegerFormat, weights: dict[str, np.ndarray], run_onnx: Callable
) -> None:
    """The second layer reads the first one's result: it must read what comes after the rescale and the bias."""
    sample = np.random.default_rng(0).standard_normal((2, 2, 4, 4)).astype(np.float32)
    rows = np.asarray([2, 0])
    text = np.zeros((2, 1, 2), np.float32)
    given = {"sample": sample, "timestep_index": rows, "encoder_hidden_states": text, "act_scales": SCALES}
    found = run_onnx(lowered(weights, fmt), given)["noise_pred"]
    scale = torch.from_numpy(SCALES[rows]).view(2, 2, 1, 1, 1)
    w, b, m = (torch.from_numpy(weights[name]) for name in "wbm")
    y = torch.conv2d(fake_quantize(torch.from_numpy(sample), scale[:, 0], fmt), w, b, padding=1)
    expected = fake_quantize(y, scale[:, 1], fmt) @ m
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_names_tell_the_parts_and_the_output_keeps_its_own(weights: dict[str, np.ndarray]) -> None:
    graph = lowered(weights, INT4).graph
    names = [node.name for node in graph.node]
    conv = [name for name in names if name.startswith("conv/")]
    assert conv == [
        "conv/input_quantizer/scaled",
        "conv/input_quantizer/clipped",
        "conv/input_quantizer/codes",
        "conv/input_quantizer/dequantized",
        "conv/rescaled",
        "conv/biased",
    ]
    assert graph.output[0].name == "noise_pred"
    limits = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    np.testing.assert_allclose(limits["conv/input_quantizer/lowest"], -8 * REFERENCE_SCALES[0])
    np.testing.assert_allclose(limits["conv/input_quantizer/highest"], 7 * REFERENCE_SCALES[0])


def test_layers_of_a_point_must_read_one_tensor(weights: dict[str, np.ndarray]) -> None:
    model = graph_from_text(GRAPH, weights)
    layers = [
        LayerNode(LayerPlan(name, op, "none", "p", ""), node, None)
        for name, op, node in zip(("conv", "mm"), ("conv", "linear"), model.graph, strict=True)
    ]
    rows = GatherScales((QuantizerSpec("p", 0.1, 4),), 3, ir.DataType.FLOAT)
    rows(model)
    with pytest.raises(GraphContractError, match="activation quantizer p: conv, mm do not read one tensor"):
        lower_rescale(model.graph, "p", INT8, layers, rows.scales["p"])
