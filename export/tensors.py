"""Initializers that read their data when they are written, and the writer: one tensor at a time goes to the disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from s2p_deploy.context import silent
from s2p_deploy.errors import InputError
from s2p_deploy.records.files import writing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from s2p_deploy.context import Progress

_INLINE_UP_TO = 1024  # bytes; scales, zero points and shapes stay readable in the graph file

DTYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16}
FLOAT32_SUFFIX = "_fp32"  # ends the names of values that are float32 in a graph of another type


def lazy(name: str, shape: Sequence[int], dtype: ir.DataType, make: Callable[[], NDArray[np.generic]]) -> ir.Value:
    """Makes an initializer whose data ``make`` returns when the file is written; it is not kept afterwards.

    Raises (when written):
        InputError: a value is not finite in ``dtype``.
    """
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    return give_data(value, dtype, make)


def give_data(value: ir.Value, dtype: ir.DataType, make: Callable[[], NDArray[np.generic]]) -> ir.Value:
    """Gives an initializer its data as :func:`lazy` does, and its element type; returns the initializer."""
    name = str(value.name)

    # a closure, not the array: only the tensor that is being written is in memory
    def data() -> ir.TensorProtocol:
        return ir.Tensor(_cast(make(), dtype, name), dtype=dtype, name=name)

    assert value.shape is not None  # an initializer has a shape
    value.type = ir.TensorType(dtype)
    value.const_value = ir.LazyTensor(data, dtype=dtype, shape=ir.Shape(value.shape.numpy()), name=name)
    return value


def constant(name: str, array: NDArray[np.generic]) -> ir.Value:
    """Makes an initializer with its data."""
    tensor = ir.Tensor(array, name=name)
    return ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)


def reshaped(value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
    """Makes a lazy initializer with the name and the data of ``value`` in another shape, to take its place."""
    tensor = value.const_value
    assert tensor is not None  # it is an initializer
    return lazy(str(value.name), shape, tensor.dtype, lambda: tensor.numpy().reshape(shape))


def stored_bytes(model: ir.Model) -> int:
    """Returns the bytes of all initializers as they are stored; nothing is read for it."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)


def write_model(
    model: ir.Model,
    file: Path,
    progress: Progress = silent,
    stage: str = "write weights",
    *,
    one_file_up_to: int = 0,
) -> None:
    """Writes a graph and its one external data file, tensor by tensor, and checks it as ONNX.

    Args:
        model: the graph.
        file: its file; the data goes to ``<file>.data`` beside it.
        progress: called after every tensor.
        stage: what progress calls this.
        one_file_up_to: bytes of weights that stay inside the graph file.

    Raises:
        InputError: the disk is full, or a value is not finite in its type.
    """
    import onnx

    with writing(file):
        ir.save(
            model,
            file,
            external_data=f"{file.name}.data" if stored_bytes(model) > one_file_up_to else None,
            size_threshold_bytes=_INLINE_UP_TO,
            callback=lambda _tensor, info: progress(stage, info.index + 1, info.total),
        )
    onnx.checker.check_model(str(file), full_check=True)


def _cast(array: NDArray[np.generic], dtype: ir.DataType, name: str) -> NDArray[np.generic]:
    if not dtype.is_floating_point():
        return np.ascontiguousarray(array)
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(array.astype(dtype.numpy()))
    if not np.isfinite(cast).all():
        raise InputError(f"{name} has a value that is not finite in {dtype}: export with --dtype fp32")
    return cast
