"""Writes the probe's small ONNX graphs: every method adds one operator or constant and returns its value's name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from s2p_deploy.records import TensorSpec

OPSET = 21  # the first with INT4 and blocks
_IR_VERSION = 10


class Graph:
    """Collects nodes and initializers; floating values have ``dtype`` unless said otherwise."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []

    def constant(self, value: NDArray[Any] | np.generic) -> str:
        """An initializer of the value's own dtype."""
        name = f"constant_{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def codes(self, values: NDArray[Any], kind: str) -> str:
        """An initializer of integer codes, ``int8`` or ``int4`` (two per byte)."""
        name = f"codes_{len(self._constants)}"
        onnx_type = onnx.TensorProto.INT4 if kind == "int4" else onnx.TensorProto.INT8
        flat = values.astype(np.int8).flatten().tolist()
        self._constants.append(helper.make_tensor(name, onnx_type, values.shape, flat))
        return name

    def op(self, kind: str, inputs: list[str], output: str = "", **attributes: int | list[int]) -> str:
        """Any operator with one output."""
        name = output or f"{kind}_{len(self._nodes)}"
        node = helper.make_node(kind, inputs, [name], name=name)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        self._nodes.append(node)
        return name

    def cast(self, value: str) -> str:
        """To the graph's floating type."""
        return self.op("Cast", [value], to=helper.np_dtype_to_tensor_dtype(self.dtype))

    def ratio(self, above: str | float, below: str | float) -> str:
        """A quotient of float32 values, cast once. Numbers become constants."""
        names = [v if isinstance(v, str) else self.constant(np.float32(v)) for v in (above, below)]
        return self.cast(self.op("Div", names))

    def quantize(self, value: str, scale: str) -> str:
        """INT8 codes of a value."""
        return self.op("QuantizeLinear", [value, scale, self.constant(np.int8(0))])

    def dequantize(self, codes: str, scale: str, axis: int = 1, block: int = 0) -> str:
        """Codes times a scale: of the tensor, per channel along ``axis``, or per ``block`` values along it."""
        return self.op("DequantizeLinear", [codes, scale], axis=axis, block_size=block)  # 0: no blocks

    def product(self, op: str, data: str, weight: str) -> str:
        """A 3x3 convolution that keeps the size, or a matrix product."""
        return self.op("Conv", [data, weight], pads=[1] * 4) if op == "conv" else self.op("MatMul", [data, weight])

    def model(self, inputs: tuple[TensorSpec, ...], output: TensorSpec) -> onnx.ModelProto:
        """The finished model, checked against the standard."""
        graph = helper.make_graph(
            self._nodes, "pattern", list(map(_value_info, inputs)), [_value_info(output)], self._constants
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=_IR_VERSION)
        onnx.checker.check_model(model)
        return model


def _value_info(spec: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(spec.name, helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype)), spec.shape)
