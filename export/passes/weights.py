"""Weights: the shape in which operators read them, their data in floating point or as integer codes, half storage."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from s2p_deploy.export.quantization import storage_type, usable_weight_scale, weight_codes
from s2p_deploy.export.tensors import give_data, lazy
from s2p_deploy.numerics import format_by_name
from s2p_deploy.records.calibrated_model import parameter_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from s2p_deploy.export.regions import LayerNode

_HALF_FROM = 1024  # elements; smaller tensors keep their type


class DirectWeights(ir.passes.InPlacePass):
    """Turns parameters ``network.conv_in.weight`` into initializers ``conv_in.weight`` as their operators read them.

    Matrices [out, in] that a graph transposes before MatMul become [in, out], and the Transpose goes. They have no data
    yet: only once layers are located is it known which ones are stored as codes.

    Requires: an initializer without data is a parameter. Ensures: ``keys`` has the parameter of every initializer
    without data, and whether it is transposed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.keys: dict[ir.Value, tuple[str, bool]] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replaces the parameters."""
        graph = model.graph
        for traced in [value for value in graph.initializers.values() if value.const_value is None]:
            key = str(traced.name)
            readers = [node for node, _ in traced.uses()]
            transposed = len(readers) == 1 and readers[0].op_type == "Transpose"
            assert traced.shape is not None  # parameters are traced with their shapes
            shape = traced.shape.numpy()[::-1] if transposed else traced.shape.numpy()
            direct = ir.Value(name=key.removeprefix(parameter_name("")), shape=ir.Shape(shape), type=traced.type)
            if transposed:
                ir.convenience.replace_all_uses_with(readers[0].outputs[0], direct)
                graph.remove(readers[0], safe=True)
            else:
                ir.convenience.replace_all_uses_with(traced, direct)
            del graph.initializers[key]
            graph.initializers.add(direct)
            self.keys[direct] = key, transposed
        return ir.passes.PassResult(model, modified=bool(self.keys))


class StoredWeights(ir.passes.InPlacePass):
    """Gives every parameter its data, read from safetensors when the graph is written.

    The weight of a layer that the plan quantizes becomes DequantizeLinear(codes, scale, axis), with one scale per
    output channel and no zero point; every other parameter is floating point in the graph's dtype.

        W ~ codes * scale      codes = clamp(round(W / scale), qmin, qmax)

    Codes of 3, 5, 9 and 16 levels are stored as INT4, others as INT8: to an engine, fewer levels are INT4 weights whose
    outer codes do not occur.

    Conv weights [out, in, kh, kw] have their channels on axis 0, MatMul weights [in, out] on axis 1. Codes come from
    the float32 scale, so that a graph of any dtype has the same codes; the stored scale is rounded to the graph's
    dtype, because ONNX gives DequantizeLinear's result the type of its scale.

    Ensures: (1) every initializer has data; (2) every layer whose plan quantizes its weight, and no other, reads it
    from a DequantizeLinear.
    """

    def __init__(
        self,
        keys: Mapping[ir.Value, tuple[str, bool]],
        read: Callable[[str], NDArray[np.float32]],
        dtype: ir.DataType | None,
        layers: Sequence[LayerNode] = (),
        scales: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> None:
        """Takes what the data is made of.

        Args:
            keys: as :class:`DirectWeights` found them.
            read: gives a parameter's data by its name.
            dtype: the graph's floating-point type (None: every parameter keeps the type that it was traced with).
            layers: the planned layers.
            scales: float32 [out, 1, ...] weight scales by layer.
        """
        super().__init__()
        self.keys, self.read, self.dtype, self.layers, self.scales = keys, read, dtype, layers, scales or {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Gives the data."""
        for layer in self.layers:
            if layer.plan.weights != "none":
                self._quantize(model.graph, layer)
        for value in model.graph.initializers.values():
            if value.const_value is None:
                key, transposed = self.keys[value]
                dtype = self.dtype or value.dtype
                assert dtype is not None, "traced with its type"
                give_data(value, dtype, partial(self._parameter, key, transposed=transposed))
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Checks the postconditions."""
        empty = [name for name, value in model.graph.initializers.items() if value.const_value is None]
        if empty:
            raise ir.passes.PostconditionError(f"{empty[0]} has no data")
        for layer in self.layers:
            producer = layer.weight.producer()
            if (layer.plan.weights != "none") != (producer is not None and producer.op_type == "DequantizeLinear"):
                raise ir.passes.PostconditionError(f"{layer.plan.name}: weights are not {layer.plan.weights}")

    def _parameter(self, key: str, *, transposed: bool) -> NDArray[np.float32]:
        return self.read(key).T if transposed else self.read(key)

    def _quantize(self, graph: ir.Graph, layer: LayerNode) -> None:
        name, floating = layer.plan.name, layer.weight
        fmt = format_by_name(layer.plan.weights)
        assert fmt is not None  # the caller took the layers whose weights have a format
        assert self.dtype is not None, "a graph with quantized layers has one floating-point type"
        assert floating.shape is not None  # parameters have shapes
        key, transposed = self.keys[floating]
        scale = usable_weight_scale(self.scales[name], self.dtype)

        def codes() -> NDArray[np.generic]:
            made = weight_codes(self.read(key), scale, fmt)
            return made.T if transposed else made

        shape = floating.shape.numpy()
        inputs = [
            lazy(f"{name}/weight_quantizer/codes", shape, storage_type(fmt), codes),
            lazy(f"{name}/weight_quantizer/scale", (scale.size,), self.dtype, lambda: scale.reshape(-1)),
        ]
        axis = 0 if layer.plan.op == "conv" else 1
        node = ir.node("DequantizeLinear", inputs, {"axis": axis}, name=f"{name}/weight_quantizer/DequantizeLinear")
        value = node.outputs[0]
        value.name, value.dtype, value.shape = f"{name}/weight_quantizer/dequantized", self.dtype, ir.Shape(shape)
        graph.insert_before(layer.node, node)
        layer.node.replace_input_with(1, value)
        for initializer in inputs:
            graph.initializers.add(initializer)
        del graph.initializers[str(floating.name)]


class HalfStorage(ir.passes.InPlacePass):
    """Stores every float32 initializer of at least 1024 elements in float16, with a Cast to float32 behind it.

    Ensures: the nodes read float32, as before, rounded to float16 once; the arithmetic stays what it was.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replaces the initializers."""
        graph = model.graph
        large = [value for value in graph.initializers.values() if _is_large(value)]
        for value in large:
            assert value.const_value is not None  # it was looked at
            tensor, name = value.const_value, str(value.name)
            del graph.initializers[name]
            stored = lazy(f"{name}/half", tensor.shape.numpy(), ir.DataType.FLOAT16, tensor.numpy)
            graph.initializers.add(stored)
            cast = ir.node("Cast", [stored], attributes={"to": ir.DataType.FLOAT.value}, name=f"{name}/Cast")
            cast.outputs[0].name = name
            cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), value.shape
            graph.insert_before(next(iter(graph)), cast)
            ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        return ir.passes.PassResult(model, modified=bool(large))


def _is_large(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and tensor.dtype == ir.DataType.FLOAT and tensor.size >= _HALF_FROM
