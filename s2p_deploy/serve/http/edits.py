"""OpenAI's edits and variations: pictures drawn from a picture that a client sends, as a form with files."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field, ValidationError, field_validator
from starlette.datastructures import UploadFile
from starlette.responses import Response

from s2p_deploy.serve.http.images import STREAMED, HttpLimits, ImageForm, answer, check_encoding
from s2p_deploy.serve.http.problems import PROBLEMS, Problem, RequestProblem, invalid_form

if TYPE_CHECKING:
    from s2p_deploy.serve.http.models import ServedModels
    from s2p_deploy.serve.request import ImageRequest
    from s2p_deploy.serve.service import ModelInfo

EDITS, VARIATIONS = "/v1/images/edits", "/v1/images/variations"
_FILES = {"image": "image", "image[]": "image", "mask": "mask"}  # names of files as OpenAI's clients send them
_PICTURE = {"type": "string", "format": "binary"}


class EditForm(ImageForm):
    """The fields of ``POST /v1/images/edits`` besides its files ``image`` and ``mask``, as text."""

    strength: Annotated[
        float | None, Field(gt=0, le=1, description="How far the picture may be left: 0.8, with a mask 1.")
    ] = None

    @field_validator("controlnet", "ip_adapter", "lora", mode="before")
    @classmethod
    def _read_json(cls, value: object) -> object:
        """Reads a field of a form, which is text; so are its numbers, as those of other fields are."""
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value, parse_int=str, parse_float=str)
        except (ValueError, RecursionError) as error:
            raise ValueError("it must be a list in JSON") from error


class VariationForm(EditForm):
    """The fields of ``POST /v1/images/variations`` besides its file ``image``; a prompt is not needed."""

    prompt: str = ""


def edit_routes(models: ServedModels, limits: HttpLimits) -> APIRouter:
    """Makes the routes ``/v1/images/edits`` and ``/v1/images/variations``."""
    router = APIRouter(responses=PROBLEMS)

    async def drawn(request: Request, kind: type[EditForm], files: frozenset[str]) -> Response:
        form, sent = await _read_form(request, kind, files, limits.upload_bytes)
        service = models.service(form.model)
        requests = await asyncio.to_thread(_started, form, sent, service.info, limits)
        return await answer(service, requests, request, limits, stream=form.stream)

    @router.post(EDITS, responses=STREAMED, openapi_extra=_body(EditForm, ("image", "mask")))
    async def edit(request: Request) -> Response:
        """Draws a picture anew, all of it or what a mask marks: its transparent parts, or without any its white ones.

        Without a mask the picture's own transparent parts are the mask, where it has any.
        """
        return await drawn(request, EditForm, frozenset({"image", "mask"}))

    @router.post(VARIATIONS, responses=STREAMED, openapi_extra=_body(VariationForm, ("image",)))
    async def vary(request: Request) -> Response:
        """Draws variations of a picture."""
        return await drawn(request, VariationForm, frozenset({"image"}))

    return router


async def _read_form(
    request: Request, kind: type[EditForm], allowed: frozenset[str], most_bytes: int
) -> tuple[EditForm, dict[str, bytes]]:
    """Reads the fields, of ``most_bytes`` each, and the files of a form; a field of no characters was left out.

    Raises:
        RequestProblem: it is no form of this kind. HTTPException: it is none at all.
    """
    _require_form(request)
    fields: dict[str, str] = {}
    files: dict[str, bytes] = {}
    most = len(kind.model_fields) + 1  # one more, so that a foreign one is named
    async with request.form(max_files=len(allowed) + 1, max_fields=most, max_part_size=most_bytes) as data:
        for name, value in data.multi_items():
            if name in fields or _FILES.get(name) in files:
                raise _refusal(f"{name} is given twice: send it once", name)
            if isinstance(value, UploadFile):
                if _FILES.get(name) not in allowed:
                    raise _refusal(f"a file {name} is not supported: there are {', '.join(sorted(allowed))}", name)
                files[_FILES[name]] = await value.read()
            elif name in _FILES:
                raise _refusal(f"{name} must be sent as a file", name)
            else:
                fields[name] = value
    if "image" not in files:
        raise _refusal("image is missing: send a PNG, JPEG or WebP file", "image")
    try:
        given = {name: value for name, value in fields.items() if value}
        return kind.model_validate_strings(given, strict=False), files
    except ValidationError as error:
        raise RequestProblem(invalid_form(error.errors()[0], kind.model_fields)) from error


def _started(form: EditForm, files: dict[str, bytes], info: ModelInfo, limits: HttpLimits) -> list[ImageRequest]:
    """Makes one request per picture, all from the picture that was sent.

    Raises:
        RequestProblem: more than a client may request. InputError: the picture or the mask cannot be used.
    """
    from s2p_deploy.pipeline import StartPicture  # with PyTorch: a server answers before that is loaded

    requests = form.requests(info, limits)
    asked = requests[0].size or (info.size if form.size not in {None, "auto"} else None)
    sizes = (info.size, *sorted(limits.sizes)) if asked is None else (asked,)
    start = StartPicture.read(
        files["image"],
        files.get("mask"),
        strength=form.strength,
        alpha=not isinstance(form, VariationForm),
        sizes=sizes,
    )
    size = None if start.size == info.size else start.size
    return [replace(request, start=start, size=size) for request in requests]


def _require_form(request: Request) -> None:
    """Refuses another body than a form with files.

    A page of another site can send one; :class:`s2p_deploy.serve.http.middleware.AuthMiddleware` refuses those by their
    origin.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise RequestProblem(
            Problem(415, "the body must be multipart/form-data (the Content-Type header says otherwise)")
        )
    check_encoding(request)


def _body(kind: type[EditForm], files: tuple[str, ...]) -> dict[str, Any]:
    """Describes a form to OpenAPI."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")  # where the JSON form puts its parts
    schema.pop("$defs", None)
    schema["properties"] |= dict.fromkeys(files, _PICTURE)
    schema["required"] = [*schema.get("required", []), "image"]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def _refusal(message: str, param: str) -> RequestProblem:
    return RequestProblem(Problem(400, message, param))
