"""Stores float32 weights in half precision; the arithmetic stays what it was."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import onnx_ir as ir

from s2p_deploy.export.tensors import lazy

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SMALLEST = 1024  # elements; smaller tensors keep their type


class HalfStorage(ir.passes.InPlacePass):
    """Every float32 initializer of at least 1024 elements becomes float16, with a Cast to float32 behind it.

    Ensures: what the nodes read is float32, as before, rounded to float16 once.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replaces the initializers."""
        graph = model.graph
        large = [value for value in graph.initializers.values() if _is_large(value)]
        for value in large:
            assert value.const_value is not None  # it was looked at
            tensor, name = value.const_value, value.name or ""
            del graph.initializers[name]
            stored = lazy(f"{name}/half", tensor.shape.numpy(), ir.DataType.FLOAT16, partial(_read, tensor))
            graph.initializers.add(stored)
            cast = ir.node("Cast", [stored], attributes={"to": ir.DataType.FLOAT.value}, name=f"{name}/Cast")
            cast.outputs[0].name = name
            cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), value.shape
            first = next(node for node in graph)
            graph.insert_before(first, cast)
            ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        return ir.passes.PassResult(model, modified=bool(large))


def _is_large(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and tensor.dtype == ir.DataType.FLOAT and tensor.size >= _SMALLEST


def _read(tensor: ir.TensorProtocol) -> NDArray[np.float32]:
    values: NDArray[np.float32] = tensor.numpy()
    return values
