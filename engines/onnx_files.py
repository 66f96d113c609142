"""ONNX files read with care: where external data points is checked before any other parser opens the file."""

from __future__ import annotations

import stat
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # protobuf ships no stubs

from s2p_deploy.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_NOT_ONNX = (DecodeError, ir.serde.SerdeError, ValueError, TypeError)


def read_onnx(path: Path) -> ir.Model:
    """Reads a model; tensors in external data are mapped when asked for, never before.

    Raises:
        IntegrityError: it is no ONNX file, or its external data is not what :func:`check_external_data` asks for.
    """
    try:
        model = ir.from_proto(onnx.load_model(path, load_external_data=False))
    except (OSError, *_NOT_ONNX) as error:
        raise IntegrityError(f"{path} is no ONNX model ({type(error).__name__})") from error
    check_external_data(model, path.parent)
    ir.external_data.set_base_dir(model.graph, path.parent)
    return model


def write_onnx(model: ir.Model, path: Path) -> None:
    """Writes ``path`` and ``<path>.data`` beside it, one tensor in memory at a time."""
    ir.save(model, path, external_data=f"{path.name}.data")


def check_external_data(model: ir.Model, folder: Path) -> None:
    """Checks that every external tensor names a plain file of ``folder`` and lies inside it, at its full length.

    A plain file: relative, no way out of the folder, regular, with one link.

    Raises:
        IntegrityError: one does not.
    """
    for tensor in _external_tensors(model):
        _check_bounds(tensor, _size_of_plain_file(folder, str(tensor.location), tensor.name))


def check_external_bytes(model_bytes: bytes | bytearray, sizes: Mapping[str, int]) -> None:
    """The same for a model in memory whose external files are in memory too, by name.

    Raises:
        IntegrityError: it is no ONNX model, or a tensor asks for another file or for more than the file has.
    """
    try:
        model = ir.from_proto(onnx.load_model_from_string(bytes(model_bytes)))
    except _NOT_ONNX as error:
        raise IntegrityError(f"the engine holds no ONNX model ({type(error).__name__}): build it again") from error
    for tensor in _external_tensors(model):
        if str(tensor.location) not in sizes:
            raise IntegrityError(
                f"tensor {tensor.name} keeps its data at {str(tensor.location)!r}, which is no file of the engine"
            )
        _check_bounds(tensor, sizes[str(tensor.location)])


def _check_bounds(tensor: ir.ExternalTensor, size: int) -> None:
    start, length = tensor.offset or 0, tensor.length
    if start < 0 or length != tensor.nbytes or start + length > size:
        raise IntegrityError(
            f"tensor {tensor.name} asks for bytes {start} to {start + (length or 0)} of {tensor.location}, "
            f"which has {size}: export the graph again"
        )


def _external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """External tensors of the main graph's initializers; anywhere else they are refused."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            yield value.const_value
    for graph in model.graphs():
        hidden = () if graph is model.graph else graph.initializers.values()
        tensors = [value.const_value for value in hidden]
        tensors += [a.value for node in graph for a in node.attributes.values() if a.type == ir.AttributeType.TENSOR]
        for tensor in tensors:
            if isinstance(tensor, ir.ExternalTensor):
                raise IntegrityError(
                    f"tensor {tensor.name} is external data outside the main graph's initializers: refused"
                )


def _size_of_plain_file(folder: Path, location: str, tensor: str) -> int:
    parts = PurePosixPath(location).parts
    if len(parts) != 1 or parts[0] in {"..", "/"} or "\\" in location or "\0" in location:
        raise IntegrityError(f"tensor {tensor} keeps its data at {location!r}: only a file beside the graph is allowed")
    try:
        status = (folder / location).lstat()
    except OSError as error:
        raise IntegrityError(f"tensor {tensor} keeps its data in {location}, which is not in {folder}") from error
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        raise IntegrityError(
            f"{folder / location} must be a regular file with one link: it is a link or a special file"
        )
    return status.st_size
