"""Records as JSON that reads back exactly: what is measured once is kept for whoever judges it later.

A record is an object of its fields and its class ``record``; an array is ``{"dtype", "shape", "values"}``; what is no
finite number is its name. Reading is driven by the records' annotations, and takes nothing that they do not say.
"""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from s2p_deploy.errors import IntegrityError
from s2p_deploy.records.strict import parsed_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_RECORD = "record"
_PLAIN: tuple[type, ...] = (bool, int, str, NoneType)


class _DamagedError(Exception):
    """A value is not what its annotation says."""


def exact_text(value: Any) -> str:  # noqa: ANN401 - records, arrays, tuples, numbers
    """A value of records, float or integer arrays, tuples, dictionaries and plain values as one line of JSON."""
    return json.dumps(_encoded(value), allow_nan=False)


def exact_value(kind: Any, text: bytes, path: Path) -> Any:  # noqa: ANN401 - of the kind that is asked for
    """The value that :func:`exact_text` wrote, of the annotation ``kind``.

    Raises:
        IntegrityError: the text of ``path`` is no such value.
    """
    try:
        return _decoded(kind, parsed_json(text, path), "the file")
    except _DamagedError as error:
        raise IntegrityError(f"{path} is damaged: {error}: make the artifact again") from error


def _encoded(value: Any) -> Any:  # noqa: ANN401 - a walk over nested data
    if isinstance(value, np.generic):
        return _encoded(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, np.ndarray):
        return {"dtype": str(value.dtype), "shape": list(value.shape), "values": _encoded(value.ravel().tolist())}
    if isinstance(value, list | tuple):
        return [_encoded(item) for item in value]
    if isinstance(value, dict):
        return {key: _encoded(item) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return {_RECORD: type(value).__name__} | {f.name: _encoded(getattr(value, f.name)) for f in fields(value)}
    return value


def _decoded(kind: Any, data: Any, where: str) -> Any:  # noqa: ANN401 - a walk over nested data
    origin, parts = get_origin(kind), get_args(kind)
    if origin in {Union, UnionType}:
        return _decoded(_member(parts, data, where), data, where)
    if is_dataclass(kind):
        return _record(kind, data, where)
    readers: dict[Any, Callable[[], Any]] = {
        float: lambda: _number(data, where),
        tuple: lambda: _items(parts, data, where),
        dict: lambda: {key: _decoded(parts[1], item, f"{where}.{key}") for key, item in _object(data, where).items()},
        np.ndarray: lambda: _array(np.dtype(get_args(parts[1])[0]), data, where),
        Literal: lambda: _literal(parts, data, where),
    } | {plain: lambda: _exactly(kind, data, where) for plain in _PLAIN}
    return readers[origin or kind]()


def _member(parts: tuple[Any, ...], data: Any, where: str) -> Any:  # noqa: ANN401 - one of the annotations
    """The one alternative that the data's form allows."""
    for kind in parts:
        origin = get_origin(kind) or kind
        if is_dataclass(origin):
            fits = isinstance(data, dict) and data.get(_RECORD) == getattr(origin, "__name__", "")
        elif origin is np.ndarray:
            fits = isinstance(data, dict) and "dtype" in data
        elif origin is tuple:
            fits = isinstance(data, list)
        elif origin is float:
            fits = type(data) in {int, float} or (isinstance(data, str) and data in _NOT_FINITE)
        else:
            fits = type(data) is origin
        if fits:
            return kind
    raise _DamagedError(f"{where} is none of what it can be")


def _record(kind: Any, data: Any, where: str) -> Any:  # noqa: ANN401 - a dataclass and its record
    given = dict(_object(data, where))
    if given.pop(_RECORD, None) != kind.__name__:
        raise _DamagedError(f"{where} is no {kind.__name__}")
    known = {field.name: field for field in fields(kind)}
    missing = [name for name, field in known.items() if name not in given and not _has_default(field)]
    for name in [*missing, *sorted(set(given) - set(known))]:
        raise _DamagedError(f"{where}.{name} {'is missing' if name in missing else 'is unknown'}")
    hints = _hints(kind)
    return kind(**{name: _decoded(hints[name], value, f"{where}.{name}") for name, value in given.items()})


@cache
def _hints(kind: Any) -> dict[str, Any]:  # noqa: ANN401 - a dataclass
    return get_type_hints(kind)


def _has_default(field: Field[Any]) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING


def _items(parts: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:  # noqa: ANN401 - JSON is of any type
    """A tuple of any length (``tuple[X, ...]``) or of one type each."""
    if not isinstance(data, list):
        raise _DamagedError(f"{where} is no list")
    kinds = [parts[0]] * len(data) if parts[1:] == (...,) else list(parts)
    if len(kinds) != len(data):
        raise _DamagedError(f"{where} has {len(data)} items, expected {len(kinds)}")
    pairs = zip(kinds, data, strict=True)
    return tuple(_decoded(kind, item, f"{where}.{place}") for place, (kind, item) in enumerate(pairs))


def _array(dtype: np.dtype[Any], data: Any, where: str) -> np.ndarray[Any, Any]:  # noqa: ANN401 - JSON is of any type
    given = _object(data, where)
    shape, values = given.get("shape"), given.get("values")
    if given.get("dtype") != str(dtype) or not isinstance(shape, list) or not isinstance(values, list):
        raise _DamagedError(f"{where} is no array of {dtype}")
    if any(type(size) is not int or size < 0 for size in shape) or math.prod(shape) != len(values):
        raise _DamagedError(f"{where} has not as many values as its shape says")
    read = _number if dtype.kind == "f" else _whole
    try:
        return np.array([read(value, where) for value in values], dtype=dtype).reshape(shape)
    except (OverflowError, ValueError) as error:
        raise _DamagedError(f"{where} has a value that {dtype} cannot hold") from error


def _number(data: Any, where: str) -> float:  # noqa: ANN401 - JSON is of any type
    if isinstance(data, str) and data in _NOT_FINITE:
        return _NOT_FINITE[data]
    if type(data) is int and abs(data) < 2**53:
        return float(data)
    if type(data) is not float or not math.isfinite(data):
        raise _DamagedError(f"{where} is no number")
    return data


def _whole(data: Any, where: str) -> int:  # noqa: ANN401 - JSON is of any type
    whole: int = _exactly(int, data, where)
    return whole


def _literal(allowed: tuple[Any, ...], data: Any, where: str) -> Any:  # noqa: ANN401 - one of the allowed
    if not isinstance(data, str) or data not in allowed:
        raise _DamagedError(f"{where} is none of {', '.join(map(str, allowed))}")
    return data


def _exactly(kind: type, data: Any, where: str) -> Any:  # noqa: ANN401 - of the kind
    if type(data) is not kind:
        raise _DamagedError(f"{where} is no {kind.__name__}")
    return data


def _object(data: Any, where: str) -> dict[str, Any]:  # noqa: ANN401 - JSON is of any type
    if not isinstance(data, dict):
        raise _DamagedError(f"{where} is no object")
    return data
