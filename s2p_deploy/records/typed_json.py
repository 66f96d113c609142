"""Typed JSON: text from an artifact becomes a record, or one IntegrityError that names the file and the field.

A record's fields, types and limits are declared once, on the frozen dataclass itself; pydantic reads and writes it.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, GetPydanticSchema, TypeAdapter, ValidationError
from pydantic_core import core_schema

from s2p_deploy.errors import InputError, IntegrityError

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator
    from pathlib import Path

    from pydantic import GetCoreSchemaHandler

_Record = TypeVar("_Record")

# Types as declared (no "1" for 1), finite numbers, no unknown keys.
EXACT = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")
# The same, but keys that this version does not read are left: what a stage notes for people.
OPEN = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")

Name = Annotated[str, Field(min_length=1, max_length=1000)]
Bits = Annotated[int, Field(ge=0, le=64)]
Bytes = Annotated[int, Field(ge=0)]
Dimension = Annotated[int, Field(ge=0, le=2**31 - 1)]
LatentSize = Annotated[int, Field(ge=1, le=4096)]


_INVALID = (ValidationError, InputError)  # a record's own checks raise the latter


class Strict(BaseModel):
    """A part of an artifact's JSON that no record has; unknown keys are left."""

    model_config = OPEN


@cache
def _adapter(record: Hashable) -> TypeAdapter[Any]:
    return TypeAdapter(cast("Any", record))


def read_json(record: type[_Record], text: bytes, path: Path) -> _Record:
    """Reads the JSON text of the file at ``path`` as a record.

    Raises:
        IntegrityError: it is no JSON, or a field is missing, unknown, of another type or outside its limits.
    """
    try:
        value: _Record = _adapter(cast("Hashable", record)).validate_json(text)
    except _INVALID as error:
        raise IntegrityError(f"{path} is damaged: {_flaw(error)}: make the artifact again") from error
    return value


def flaw_of(record: type[Any], text: str) -> str | None:
    """Says in one line why JSON text that is to be written is none that :func:`read_json` reads; None where it is."""
    try:
        _adapter(cast("Hashable", record)).validate_json(text)
    except _INVALID as error:
        return _flaw(error)
    return None


def read_value(record: type[_Record], value: Any, path: Path) -> _Record:  # noqa: ANN401 - JSON is of any type
    """Reads parsed JSON, a part of the file at ``path``, as a record. Raises IntegrityError as :func:`read_json`."""
    # as text again: only JSON's lists may become tuples where types are strict
    return read_json(record, json.dumps(value).encode(), path)


def json_data(record: Any) -> Any:  # noqa: ANN401 - any record
    """Returns the JSON-ready form of a record: what :func:`read_value` reads."""
    return _adapter(cast("Hashable", type(record))).dump_python(record, mode="json")


def json_text(record: Any) -> str:  # noqa: ANN401 - any record
    """Returns the text of a JSON file that holds one record."""
    return json.dumps(json_data(record), indent=1) + "\n"


def parsed_json(data: bytes, path: Path) -> Any:  # noqa: ANN401 - JSON is of any type
    """Parses JSON text. Raises IntegrityError where it is not UTF-8 JSON, or too deep or long for Python."""
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} is no JSON ({type(error).__name__}): make the artifact again") from error


@contextmanager
def reading_tensors(path: Path) -> Iterator[None]:
    """Turns errors while a safetensors file is read into IntegrityError: it is damaged, or lacks a tensor."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, OSError) as error:
        raise IntegrityError(f"{path} is damaged ({type(error).__name__}): make the artifact again") from error


def _flaw(error: Exception) -> str:
    return first_problem(error) if isinstance(error, ValidationError) else str(error)


def first_problem(error: ValidationError) -> str:
    """Returns the place and the message of a validation's first error in one line."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "the file"
    # pydantic speaks of a dataclass's arguments, where a file has keys
    unknown = first["type"] in {"unexpected_keyword_argument", "extra_forbidden"}
    return f"{where}: {'unknown key' if unknown else first['msg'].lower()}"


def array_of(numbers: Any) -> GetPydanticSchema:  # noqa: ANN401 - a type expression
    """Annotates a float64 array field: in JSON it is a list that must be ``numbers``, a pydantic list type."""

    def schema(_source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:  # noqa: ANN401 - pydantic's
        return core_schema.no_info_wrap_validator_function(
            lambda value, read: value if isinstance(value, np.ndarray) else np.asarray(read(value), dtype=np.float64),
            handler.generate_schema(numbers),
            serialization=core_schema.plain_serializer_function_ser_schema(np.ndarray.tolist),
        )

    return GetPydanticSchema(schema)
