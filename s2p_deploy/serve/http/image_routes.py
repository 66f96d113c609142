"""OpenAI's images API: pictures from a prompt, at once or with their progress, and the list of models."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from s2p_deploy.errors import S2PError
from s2p_deploy.serve.http.asked import TIMEOUT, seconds_allowed
from s2p_deploy.serve.http.content_types import takes_json
from s2p_deploy.serve.http.image_form import ImageForm
from s2p_deploy.serve.http.problems import PROBLEMS, problem_data, problem_of, request_id_of
from s2p_deploy.serve.http.request_log import LOG, note
from s2p_deploy.serve.http.tickets import pictures, progress, taken

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from PIL.Image import Image

    from s2p_deploy.serve.http.limits import HttpLimits
    from s2p_deploy.serve.http.picture_service import PictureService
    from s2p_deploy.serve.http.served_models import ServedModels
    from s2p_deploy.serve.request import ImageRequest

_STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
_EVENTS = {"cache-control": "no-store", "x-accel-buffering": "no"}  # a proxy that buffers would hold progress back


def image_routes(models: ServedModels, limits: HttpLimits) -> APIRouter:
    """``/v1/images/generations`` and ``/v1/models``."""
    router = APIRouter(prefix="/v1", responses=PROBLEMS)

    @router.post("/images/generations", dependencies=[Depends(takes_json)], responses=_STREAMED)
    async def generate(form: ImageForm, request: Request) -> Response:
        """Draws pictures."""
        service = models.service(form.model)
        asked = form.requests(service.facts, limits)
        timeout = seconds_allowed(request.headers.get(TIMEOUT), limits)
        note(request.scope, f"{len(asked)} x {asked[0].steps} steps")
        if form.stream:
            events = _events(service, asked[0], timeout, request_id_of(request.scope))
            first = await anext(events)  # what cannot be taken is refused with a status of its own
            return StreamingResponse(_joined(first, events), media_type="text/event-stream", headers=_EVENTS)
        with taken(service, asked, timeout, request_id_of(request.scope)) as tickets:
            drawn = await pictures(tickets, request)
        data = await asyncio.to_thread(_answers, drawn, asked)
        return JSONResponse({"created": int(time.time()), "data": data})

    @router.get("/models")
    async def list_models() -> JSONResponse:
        """The models that are served, with what a request may leave out."""
        return JSONResponse({"object": "list", "data": [_described(name, models, limits) for name in models.names]})

    return router


async def _events(
    service: PictureService, asked: ImageRequest, timeout: float, request_id: str
) -> AsyncIterator[bytes]:
    """Server-sent events. The first comes as soon as the request is taken."""
    with taken(service, [asked], timeout, request_id) as (ticket,):
        yield _event("image_generation.progress", {"done": 0, "total": 0})
        async for done, total in progress(ticket):
            yield _event("image_generation.progress", {"done": done, "total": total})
        try:
            picture = ticket.picture.result()
        except Exception as error:  # the status is out already: the stream says it
            if not isinstance(error, S2PError):
                LOG.exception("%s failed", request_id)
            yield _event("error", problem_data(problem_of(error), request_id))
            return
    (answer,) = await asyncio.to_thread(_answers, [picture], [asked])
    size = f"{picture.width}x{picture.height}"
    about = {"created_at": int(time.time()), "size": size, "output_format": "png"}
    yield _event("image_generation.completed", about | answer)


async def _joined(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for event in rest:
        yield event


def _event(kind: str, data: dict[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind} | data)}\n\n".encode()


def _answers(drawn: list[Image], asked: list[ImageRequest]) -> list[dict[str, Any]]:
    return [{"b64_json": _png(picture), "seed": request.seed} for picture, request in zip(drawn, asked, strict=True)]


def _png(picture: Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _described(name: str, models: ServedModels, limits: HttpLimits) -> dict[str, Any]:
    """A model in OpenAI's form, with its facts once it is loaded."""
    service = models.loaded(name)
    about: dict[str, Any] = {"id": name, "object": "model", "created": 0, "owned_by": "s2p-deploy"}
    if service is None:
        return about | {"ready": False}
    facts = service.facts
    sizes = (facts.size, *sorted(limits.sizes))
    return about | {
        "ready": models.state == "ready",
        "engine": facts.engine,
        "backend": facts.backend,
        "hint": facts.hint,
        "recipe": facts.recipe,
        "batching": facts.batching,
        "batches": [{"samples": samples, "milliseconds": cost} for samples, cost in facts.batches],
        "steps": facts.steps,
        "most_steps": limits.steps,
        "guidance_scale": facts.guidance_scale,
        "most_guidance_scale": limits.guidance_scale,
        "most_prompt_characters": limits.prompt_characters,
        "sizes": [f"{width}x{height}" for height, width in sizes],
        "schedulers": list(facts.schedulers),
    }
