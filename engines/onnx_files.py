"""ONNX files read with care: a model is checked, and where its external data points, before any other parser sees it.

What a graph of this package never has is refused, because a parser's rarely walked paths are where it can be hurt:
subgraphs and functions, other operators than ONNX's own, training parts, sparse tensors, and external data anywhere but
in the main graph's initializers.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from s2p_deploy.errors import IntegrityError
from s2p_deploy.records.artifacts import VerifiedReader
from s2p_deploy.records.files import read_plain

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

MOST_MODEL = 512 * 2**20  # bytes without external data; the graph of SD v1-4 has less than 2 MiB
_OWN_DOMAINS = {"", "ai.onnx"}
_MADE_HERE = {("com.microsoft", "MultiHeadAttention")}  # operators outside ONNX that a pass writes
_SIZE_LIMIT = 2**31
_TYPES = frozenset(kind.value for kind in ir.DataType) - {0, onnx.TensorProto.STRING}
_VALUES = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")
_NOT_ONNX = (DecodeError, ir.serde.SerdeError, ValueError, TypeError, RecursionError)
_PLAIN_ATTRIBUTES = {
    onnx.AttributeProto.FLOAT,
    onnx.AttributeProto.INT,
    onnx.AttributeProto.STRING,
    onnx.AttributeProto.TENSOR,
    onnx.AttributeProto.FLOATS,
    onnx.AttributeProto.INTS,
    onnx.AttributeProto.STRINGS,
}


def read_onnx(folder: Path, name: str, digests: Mapping[str, str]) -> ir.Model:
    """Reads a model of an artifact; tensors in external data are read, and verified once more, when they are used.

    Args:
        folder: the artifact.
        name: the model's file in it.
        digests: SHA-256 of every file of the artifact.

    Raises:
        IntegrityError: it is no ONNX file, it or its data is not what ``digests`` say, a part is refused, or a
            tensor's data is not in a plain file beside it (relative, regular, no link of either kind), inside that
            file and at its full length.
    """
    path = folder / name
    data = read_plain(folder, name, MOST_MODEL)
    if hashlib.sha256(data).hexdigest() != digests.get(name):
        raise IntegrityError(f"{path} was changed after it was written: make it again")
    proto = _parsed(data, str(path))
    readers: dict[str, VerifiedReader] = {}
    for tensor in _external_tensors(proto):
        location = _entries(tensor)["location"]
        if location == name:
            raise IntegrityError(f"tensor {tensor.name} keeps its data in the model's own file {path}: refused")
        if "/" in location or location in {"", ".", ".."}:
            raise IntegrityError(
                f"tensor {tensor.name} keeps its data at {location!r}: only a file beside the graph is allowed"
            )
        if location not in readers:
            readers[location] = VerifiedReader(folder, location, digests.get(location))
    _check_tensors(proto, {location: reader.size for location, reader in readers.items()})
    model = _as_ir(proto, str(path))
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = _verified_tensor(value.const_value, readers[str(value.const_value.location)])
    return model


def _verified_tensor(external: ir.ExternalTensor, reader: VerifiedReader) -> ir.LazyTensor:
    """Makes the same tensor read through ``reader`` each time that it is used; packed types stay packed."""
    dtype, shape, name, start = external.dtype, external.shape, external.name, external.offset or 0
    count = math.prod(shape.numpy())
    length = -(-count * dtype.bitwidth // 8)

    def load() -> ir.TensorProtocol:
        raw = reader.read(start, length)
        if dtype.bitwidth < 8:
            return ir.PackedTensor(np.frombuffer(raw, np.uint8), dtype, shape=shape, name=name)
        # little-endian, as ONNX stores it
        array = np.frombuffer(raw, dtype.numpy().newbyteorder("<")).reshape(shape.numpy())
        return ir.Tensor(array, dtype=dtype, shape=shape, name=name)

    return ir.LazyTensor(load, dtype, shape, name=name)


def write_onnx(model: ir.Model, path: Path) -> None:
    """Writes ``path`` and ``<path>.data`` beside it, one tensor in memory at a time."""
    ir.save(model, path, external_data=f"{path.name}.data")


def check_external_bytes(model_bytes: bytes | bytearray, sizes: Mapping[str, int]) -> None:
    """Checks a model in memory whose external files are in memory too, by name.

    Raises:
        IntegrityError: it is no ONNX model, it has a part that is refused, or a tensor asks for another file or for
            more than the file has.
    """
    if len(model_bytes) > MOST_MODEL:
        raise IntegrityError(f"the engine's ONNX model has more than {MOST_MODEL} bytes: build it again")
    _check_tensors(_parsed(bytes(model_bytes), "the engine's file"), sizes)


def _parsed(data: bytes, what: str) -> onnx.ModelProto:
    try:
        proto = onnx.load_model_from_string(data)
    except _NOT_ONNX as error:
        raise IntegrityError(f"{what} holds no ONNX model ({type(error).__name__}): make it again") from error
    foreign = {opset.domain for opset in proto.opset_import} - _OWN_DOMAINS - {domain for domain, _ in _MADE_HERE}
    if foreign or not proto.opset_import or proto.functions or proto.training_info or proto.graph.sparse_initializer:
        raise IntegrityError(f"{what} has functions, sparse or training parts, or foreign operators: refused")
    for node in proto.graph.node:
        own = node.domain in _OWN_DOMAINS or (node.domain, node.op_type) in _MADE_HERE
        if not own or not all(_is_plain(attribute) for attribute in node.attribute):
            raise IntegrityError(f"{what}: node {node.name} is a foreign operator or has a graph inside: refused")
    return proto


def _is_plain(attribute: onnx.AttributeProto) -> bool:
    """Numbers, text or one tensor; no graph in any field, whatever the type says."""
    hidden = attribute.HasField("g") or attribute.graphs or attribute.tensors or attribute.ref_attr_name
    return attribute.type in _PLAIN_ATTRIBUTES and not hidden


def _as_ir(proto: onnx.ModelProto, what: str) -> ir.Model:
    try:
        return ir.from_proto(proto)
    except (KeyError, AttributeError, NotImplementedError, *_NOT_ONNX) as error:
        raise IntegrityError(f"{what} holds no ONNX model ({type(error).__name__}): make it again") from error


def _check_tensors(proto: onnx.ModelProto, sizes: Mapping[str, int]) -> None:
    """Checks that tensors have shapes that exist, external ones in a file of ``sizes``, inside it, at full length."""
    for tensor in _tensors(proto):
        if any(size < 0 for size in tensor.dims) or math.prod(tensor.dims) >= _SIZE_LIMIT:
            raise IntegrityError(f"tensor {tensor.name} has the shape {list(tensor.dims)}: refused")
        if not tensor.external_data and not _holds_its_values(tensor):
            raise IntegrityError(f"tensor {tensor.name} does not hold {math.prod(tensor.dims)} values: refused")
    for tensor in _external_tensors(proto):
        _check_bounds(tensor, sizes)


def _check_bounds(tensor: onnx.TensorProto, sizes: Mapping[str, int]) -> None:
    entries = _entries(tensor)
    location = entries["location"]
    if location not in sizes:
        raise IntegrityError(f"tensor {tensor.name} keeps its data at {location!r}, which is no file of the engine")
    try:
        start, length = (_number(entries.get(key, "0")) for key in ("offset", "length"))
        wanted = _bytes_of(tensor)
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"tensor {tensor.name} has no readable place in its data: make the file again") from error
    if length != wanted or start + length > sizes[location]:
        raise IntegrityError(
            f"tensor {tensor.name} asks for bytes {start} to {start + length} of {location}, "
            f"which has {sizes[location]}, and is {wanted} long: make the file again"
        )


def _holds_its_values(tensor: onnx.TensorProto) -> bool:
    """Tells whether a tensor inside the model has the data of its shape; some types pack four values into one."""
    count = math.prod(tensor.dims)
    if tensor.raw_data:
        return bool(tensor.data_type in _TYPES and len(tensor.raw_data) == _bytes_of(tensor))
    return bool(count <= 4 * max(len(getattr(tensor, name)) for name in _VALUES))


def _bytes_of(tensor: onnx.TensorProto) -> int:
    return int(-(-math.prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth // 8))


def _number(text: str) -> int:
    """Digits only: other parsers read signs, spaces and underscores differently."""
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ValueError(text)
    return int(text)


def _entries(tensor: onnx.TensorProto) -> dict[str, str]:
    """Returns the keys of a tensor's external data: each once, and no others than a place needs."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    known = {"location"} <= set(entries) <= {"location", "offset", "length"}
    if len(entries) != len(tensor.external_data) or not known:
        raise IntegrityError(f"tensor {tensor.name} has unknown or repeated keys in its external data: refused")
    return entries


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from proto.graph.initializer
    yield from _tensors_in_nodes(proto)


def _tensors_in_nodes(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t


def _external_tensors(proto: onnx.ModelProto) -> Iterable[onnx.TensorProto]:
    """Lists the external initializers; refused anywhere else. Parsers look at either mark: they must agree."""
    external = onnx.TensorProto.EXTERNAL
    for tensor in _tensors_in_nodes(proto):
        if tensor.data_location == external or tensor.external_data:
            raise IntegrityError(
                f"tensor {tensor.name} is external data outside the main graph's initializers: refused"
            )
    external_tensors = []
    for tensor in proto.graph.initializer:
        if (tensor.data_location == external) != bool(tensor.external_data):
            raise IntegrityError(f"tensor {tensor.name} says that its data is external and that it is not: refused")
        if tensor.external_data:
            external_tensors.append(tensor)
    return external_tensors
