from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from s2p_deploy.errors import GraphContractError
from s2p_deploy.export import check_graph

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from s2p_deploy.records import ExportedGraph

LAYER = "down_blocks.0.resnets.0.conv1"
POINT = f"{LAYER}/input_quantizer"


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(item for item in model.graph.node if item.name == name)


def initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(item for item in model.graph.initializer if item.name == name)


def set_scalar(model: onnx.ModelProto, name: str, value: float) -> None:
    old = initializer(model, name)
    array = np.asarray(value, helper.tensor_dtype_to_np_dtype(old.data_type))
    old.CopyFrom(numpy_helper.from_array(array, name))


def retyped_input(model: onnx.ModelProto) -> None:
    model.graph.input[1].type.tensor_type.elem_type = TensorProto.INT32


def fixed_batch(model: onnx.ModelProto) -> None:
    dimension = model.graph.input[0].type.tensor_type.shape.dim[0]
    dimension.Clear()
    dimension.dim_value = 2


def missing_scales(model: onnx.ModelProto) -> None:
    model.graph.input[3].name = "scales"


def older_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 19


def foreign_operators(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def renamed_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = node(model, "conv_out/Conv").output[0] = "sample_out"


def repeated_name(model: onnx.ModelProto) -> None:
    node(model, "conv_out/Conv").name = "conv_in/Conv"


def time_projection_left(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.eye(32, dtype=np.float32), "time_emb_proj.weight"))
    model.graph.node.append(
        helper.make_node("MatMul", ["conv_in/output", "time_emb_proj.weight"], ["unread"], "time_emb_proj/MatMul")
    )


def renamed_layer(model: onnx.ModelProto) -> None:
    node(model, "conv_out/Conv").name = "conv_out/Conv_1"


def runtime_weight_scale(model: onnx.ModelProto) -> None:
    node(model, f"{LAYER}/weight_quantizer/DequantizeLinear").input[1] = f"{POINT}/from_reference"


def runtime_activation_scale(model: onnx.ModelProto) -> None:
    node(model, f"{POINT}/dequantized").input[1] = f"{POINT}/from_reference"


def negative_scale(model: onnx.ModelProto) -> None:
    set_scalar(model, f"{POINT}/scale", -0.1)


def zero_point_of_one(model: onnx.ModelProto) -> None:
    set_scalar(model, "input_quantizer/zero_point", 1)


def second_quantizer(model: onnx.ModelProto) -> None:
    copy = onnx.NodeProto()
    copy.CopyFrom(node(model, f"{POINT}/codes"))
    copy.name, copy.output[0] = "another/codes", "another"
    model.graph.node.append(copy)


def two_scales(model: onnx.ModelProto) -> None:
    other = next(
        i.name for i in model.graph.initializer if i.name.endswith("input_quantizer/scale") and LAYER not in i.name
    )
    node(model, f"{POINT}/dequantized").input[1] = other


def unquantized_layer(model: onnx.ModelProto) -> None:
    node(model, f"{LAYER}/Conv").input[0] = f"{POINT}/scaled"


def floating_weight(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((32, 32, 3, 3), np.float32), "floating"))
    node(model, f"{LAYER}/Conv").input[1] = "floating"


def swapped_axis(model: onnx.ModelProto) -> None:
    dequantize = node(model, f"{LAYER}/weight_quantizer/DequantizeLinear")
    dequantize.attribute[0].i = 1


def bias_before_rescale(model: onnx.ModelProto) -> None:
    node(model, f"{LAYER}/Conv").input.append("conv_in.bias")


def unscaled_result(model: onnx.ModelProto) -> None:
    scale_back = node(model, f"{LAYER}/rescaled")
    scale_back.input[1] = f"{POINT}/to_reference"


def half_in_a_float_graph(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.ones(4, np.float16), "half"))
    model.graph.node.append(helper.make_node("Sqrt", ["half"], ["unread"], "stray/Sqrt"))


def data_elsewhere(model: onnx.ModelProto) -> None:
    tensor = initializer(model, f"{LAYER}/weight_quantizer/codes")
    next(entry for entry in tensor.external_data if entry.key == "location").value = "elsewhere.data"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (retyped_input, "input timestep_index is INT32"),
        (fixed_batch, "input sample has first dimension 2: expected batch"),
        (missing_scales, "inputs are sample, .*scales: expected sample, .*act_scales"),
        (older_opset, "opset 21 or later"),
        (foreign_operators, "plain ONNX"),
        (renamed_output, "expected noise_pred alone"),
        (repeated_name, "'conv_in/Conv' occurs 2 times"),
        (time_projection_left, "time_emb_proj/MatMul has a stored weight and is no planned layer"),
        (renamed_layer, "planned layer conv_out/Conv is not in the graph"),
        (runtime_weight_scale, f"{LAYER}/weight_quantizer/DequantizeLinear: its scale is not a constant"),
        (runtime_activation_scale, f"{POINT}/dequantized: its scale is not a constant"),
        (negative_scale, "finite and above zero, got -0.1"),
        (zero_point_of_one, "zero point must be the constant zero"),
        (second_quantizer, "another/codes: every activation quantizer has one QuantizeLinear"),
        (two_scales, f"{POINT}/codes: its codes must go to one DequantizeLinear with the same scale"),
        (unquantized_layer, f"layer {LAYER} reads {POINT}/scaled: its activation quantizer is {LAYER}"),
        (floating_weight, f"layer {LAYER}: weights are planned int8, stored FLOAT"),
        (swapped_axis, f"layer {LAYER}: weights need one scale per output channel on axis 0"),
        (bias_before_rescale, f"layer {LAYER}: its result must be multiplied by {POINT}/from_reference before a bias"),
        (unscaled_result, f"layer {LAYER}: its result must be multiplied by {POINT}/from_reference"),
        (half_in_a_float_graph, "half is FLOAT16 in a graph of FLOAT"),
        (data_elsewhere, "lies in elsewhere.data: external data belongs in denoiser.onnx.data"),
    ],
)
def test_every_rule_names_what_breaks_it(
    damage: Callable[[onnx.ModelProto], None], message: str, w8a8_graph: ExportedGraph, tmp_path: Path
) -> None:
    model = onnx.load(w8a8_graph.onnx_file, load_external_data=False)
    damage(model)
    onnx.save(model, tmp_path / "denoiser.onnx")
    for name in ("denoiser.onnx.data", "elsewhere.data"):
        shutil.copy(w8a8_graph.folder / "denoiser.onnx.data", tmp_path / name)
    with pytest.raises(GraphContractError, match=message):
        check_graph(tmp_path / "denoiser.onnx", w8a8_graph.plan)


def test_four_bit_activations_need_their_clip(w8a8_graph: ExportedGraph, w4a4_graph: ExportedGraph) -> None:
    check_graph(w4a4_graph.onnx_file, w4a4_graph.plan)
    with pytest.raises(GraphContractError, match="int4 and no Clip before its quantizer"):
        check_graph(w8a8_graph.onnx_file, w4a4_graph.plan)
