"""KServe's v2 form of tensors: JSON, or JSON followed by the tensors' bytes (the binary tensor extension)."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from s2p_deploy.serve.http.problems import refusal

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from s2p_deploy.serve.http.problems import RequestProblem

BINARY_LENGTH = "inference-header-content-length"
_BINARY_SIZE = "binary_data_size"
_NUMBERS = {"INT32": "<i4", "INT64": "<i8", "FP32": "<f4"}
_MOST_FP32 = float(np.finfo(np.float32).max)
_MOST_ELEMENTS = 64
_MOST_DEPTH = 4


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_float32(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MOST_FP32


def _is_integer(value: object, bits: int) -> bool:
    return type(value) is int and -(2 ** (bits - 1)) <= value < 2 ** (bits - 1)


_FITS: dict[str, Callable[[object], bool]] = {
    "BYTES": _is_text,
    "FP32": _is_float32,
    "INT32": partial(_is_integer, bits=32),
    "INT64": partial(_is_integer, bits=64),
}


class TensorForm(BaseModel):
    """An input. Its values are in ``data``, or behind the JSON where ``parameters`` say how many bytes."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    shape: Annotated[list[Annotated[int, Field(ge=1, le=_MOST_ELEMENTS)]], Field(min_length=1, max_length=_MOST_DEPTH)]
    datatype: str
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None


class OutputForm(BaseModel):
    """An output that is asked for, and how."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    parameters: dict[str, Any] = {}


class InferForm(BaseModel):
    """The JSON of an inference request."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: Annotated[str | None, Field(max_length=128)] = None
    inputs: Annotated[list[TensorForm], Field(min_length=1, max_length=16)]
    outputs: Annotated[list[OutputForm] | None, Field(max_length=16)] = None
    parameters: dict[str, Any] = {}


@dataclass(frozen=True)
class Tensor:
    """An input that was read: texts of BYTES, numbers of the rest, in row-major order."""

    datatype: str
    values: tuple[Any, ...]


def read_request(body: bytes, json_length: str | None) -> tuple[InferForm, dict[str, Tensor]]:
    """An inference request and its inputs by name; ``json_length`` is what the binary extension's header says.

    Raises:
        RequestProblem: it is none, or a tensor does not hold what its shape and datatype say.
    """
    length = len(body)
    if json_length is not None:
        if not json_length.isdecimal() or not int(json_length[:20]) <= len(body):
            raise refusal(f"{BINARY_LENGTH} must be the number of bytes of the JSON part")
        length = int(json_length)
    try:
        form = InferForm.model_validate_json(body[:length])
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise refusal(f"{place or 'the body'}: {first['msg']}") from error
    rest = memoryview(body)[length:]
    found: dict[str, Tensor] = {}
    for tensor in form.inputs:
        if tensor.name in found:
            raise refusal(f"input {tensor.name!r} is given twice")
        size = tensor.parameters.get(_BINARY_SIZE)
        if size is None:
            values = _values_of_json(tensor)
        else:
            if type(size) is not int or not 0 <= size <= len(rest):
                raise refusal(f"input {tensor.name!r}: {_BINARY_SIZE} is not how many bytes there are")
            values, rest = _values_of_bytes(tensor, bytes(rest[:size])), rest[size:]
        if len(values) != math.prod(tensor.shape):
            raise refusal(f"input {tensor.name!r} has {len(values)} values, its shape {tensor.shape} others")
        found[tensor.name] = Tensor(tensor.datatype, tuple(values))
    if len(rest):
        raise refusal(f"{len(rest)} bytes follow the tensors that the request names")
    return form, found


def described_request() -> dict[str, Any]:
    """The JSON schema of an inference request, without references: OpenAPI resolves them from another place."""
    schema = InferForm.model_json_schema()
    parts = schema.pop("$defs")

    def whole(node: Any) -> Any:  # noqa: ANN401 - JSON
        if isinstance(node, list):
            return [whole(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return whole(parts[node["$ref"].rsplit("/", 1)[1]])
        return {key: whole(value) for key, value in node.items()}

    found: dict[str, Any] = whole(schema)
    return found


def written_answer(about: dict[str, Any], name: str, pixels: NDArray[np.uint8], *, binary: bool) -> tuple[bytes, int]:
    """An answer with one UINT8 output, and the bytes of its JSON part (0 where it is JSON as a whole)."""
    output: dict[str, Any] = {"name": name, "datatype": "UINT8", "shape": list(pixels.shape)}
    if not binary:
        return json.dumps(about | {"outputs": [output | {"data": pixels.ravel().tolist()}]}).encode(), 0
    head = json.dumps(about | {"outputs": [output | {"parameters": {_BINARY_SIZE: pixels.nbytes}}]}).encode()
    return head + pixels.tobytes(), len(head)


def _values_of_json(tensor: TensorForm) -> list[Any]:
    fits = _FITS.get(tensor.datatype)
    if fits is None:
        raise _unknown(tensor)
    values = list(_flat(tensor.data or [], _MOST_DEPTH))
    if not all(map(fits, values)):
        raise refusal(f"input {tensor.name!r} must be {tensor.datatype}, and its data of that kind")
    return values


def _values_of_bytes(tensor: TensorForm, data: bytes) -> list[Any]:
    if tensor.datatype == "BYTES":
        return list(_texts(tensor.name, data))
    if tensor.datatype not in _NUMBERS:
        raise _unknown(tensor)
    kind = np.dtype(_NUMBERS[tensor.datatype])
    if len(data) % kind.itemsize:
        raise refusal(f"input {tensor.name!r}: {len(data)} bytes are no whole number of {tensor.datatype}")
    values = np.frombuffer(data, kind).tolist()
    if not all(map(math.isfinite, values)):
        raise refusal(f"input {tensor.name!r} must be finite")
    return list(values)


def _texts(name: str, data: bytes) -> Iterator[str]:
    """Elements of BYTES: four bytes of length, little endian, then UTF-8."""
    place = 0
    while place < len(data):
        end = place + 4
        (length,) = struct.unpack_from("<I", data, place) if end <= len(data) else (len(data),)
        if end + length > len(data):
            raise refusal(f"input {name!r}: an element is longer than the tensor")
        try:
            yield data[end : end + length].decode()
        except UnicodeDecodeError as error:
            raise refusal(f"input {name!r} must be UTF-8") from error
        place = end + length


def _flat(data: list[Any], depth: int) -> Iterator[Any]:
    for value in data:
        if isinstance(value, list) and depth > 1:
            yield from _flat(value, depth - 1)
        else:
            yield value


def _unknown(tensor: TensorForm) -> RequestProblem:
    return refusal(f"input {tensor.name!r}: datatype {tensor.datatype!r} is not taken")
