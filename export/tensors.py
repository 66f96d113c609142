"""Initializers that read their data when they are written: one tensor at a time goes from safetensors to the graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from s2p_deploy.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

DTYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16}
FULL = "_fp32"  # ends the names of values that are float32 in a graph of another type


def lazy(name: str, shape: Sequence[int], dtype: ir.DataType, make: Callable[[], NDArray[np.generic]]) -> ir.Value:
    """An initializer whose data ``make`` returns when the file is written; it is not kept afterwards.

    Raises (when written):
        InputError: a value is not finite in ``dtype``.
    """

    def data() -> ir.TensorProtocol:
        return ir.Tensor(_cast(make(), dtype, name), dtype=dtype, name=name)

    tensor = ir.LazyTensor(data, dtype=dtype, shape=ir.Shape(shape), name=name)
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)


def constant(name: str, array: NDArray[np.generic]) -> ir.Value:
    """An initializer with its data."""
    tensor = ir.Tensor(array, name=name)
    return ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)


def reshaped(value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
    """A lazy initializer of the same name and data in another shape; it takes the place of ``value``."""
    tensor = value.const_value
    assert tensor is not None  # it is an initializer
    return lazy(str(value.name), shape, tensor.dtype, lambda: tensor.numpy().reshape(shape))


def stored_bytes(model: ir.Model) -> int:
    """Bytes of all initializers as they are stored; nothing is read for it."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)


def _cast(array: NDArray[np.generic], dtype: ir.DataType, name: str) -> NDArray[np.generic]:
    if not dtype.is_floating_point():
        return np.ascontiguousarray(array)
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(array.astype(dtype.numpy()))
    if not np.isfinite(cast).all():
        raise InputError(f"{name} has a value that is not finite in {dtype}: export with --dtype fp32")
    return cast
