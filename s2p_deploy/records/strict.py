"""Strict reading: text from an artifact becomes typed values, or one IntegrityError that names the place."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from s2p_deploy.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_Model = TypeVar("_Model", bound=BaseModel)


class Strict(BaseModel):
    """A part of an artifact's JSON: types as said, numbers finite; keys that this version does not read are left."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")


def parsed_json(data: bytes, path: Path) -> Any:  # noqa: ANN401 - JSON is of any type
    """The value of JSON text. Raises IntegrityError where it is not UTF-8 JSON, or too deep or long for Python."""
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} is no JSON ({type(error).__name__}): make the artifact again") from error


def read_as(model: type[_Model], data: bytes, path: Path) -> _Model:
    """The content of a JSON file. Raises IntegrityError where it is not what ``model`` says."""
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise IntegrityError(f"{path} is damaged: {first_problem(error)}: make the artifact again") from error


def checked(model: type[_Model], value: Any, path: Path) -> _Model:  # noqa: ANN401 - JSON is of any type
    """The same for a value that was parsed before."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise IntegrityError(f"{path} is damaged: {first_problem(error)}: make the artifact again") from error


@contextmanager
def reading_tensors(path: Path) -> Iterator[None]:
    """Turns what goes wrong while a safetensors file is read into IntegrityError: it is damaged, or lacks a tensor."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
        raise IntegrityError(f"{path} is damaged ({type(error).__name__}): make the artifact again") from error


def first_problem(error: ValidationError) -> str:
    """Where and what, in a few words."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "the file"
    return f"{where}: {first['msg'].lower()}"
