"""What OpenVINO's runtime model says each ONNX node is computed in."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import openvino

_INTEGER = {"i8", "u8"}
_PRODUCTS = {"Convolution", "FullyConnected", "MatMul", "GroupConvolution"}
_TYPES = {"f32": "fp32", "f16": "fp16"}
_FUSED_SUFFIX = "/DequantizationMultiply"  # appended to a MatMul whose scale OpenVINO moved behind it


def compute_types(runtime: openvino.Model, output_producers: Mapping[str, str]) -> dict[str, str]:
    """ONNX node -> ``int8``, ``fp32``, ``bf16``, ... of every convolution and matrix product in the runtime model.

    ``runtimePrecision`` of a FullyConnected is the narrowest of its operands', so a weight-only INT8 product would read as
    i8 too: a product counts as int8 only where its data operand arrives in i8 or u8 as well.
    """
    found: dict[str, str] = {}
    for layer in runtime.get_ordered_ops():
        info = layer.get_rt_info()
        if _text(info, "layerType") not in _PRODUCTS:
            continue
        data = _text(layer.input_value(0).get_node().get_rt_info(), "outputPrecisions").split(",")
        operand = data[min(layer.input_value(0).get_index(), len(data) - 1)]
        reported = _text(info, "runtimePrecision")
        kind = "int8" if {operand, reported} <= _INTEGER else _TYPES.get(operand, operand)
        for name in _original_names(_text(info, "originalLayersNames")):
            found[output_producers.get(name, name)] = kind
    return found


def _original_names(names: str) -> list[str]:
    return [name.removesuffix(_FUSED_SUFFIX) for name in names.split(",") if name]


def _text(info: openvino.RTMap, key: str) -> str:
    return str(info[key].astype(str)) if key in info else ""
