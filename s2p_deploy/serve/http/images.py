"""OpenAI's images API: pictures from a prompt, at once or with their progress, and the list of models."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import secrets
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.responses import JSONResponse, Response, StreamingResponse

from s2p_deploy.context import MOST_SEED
from s2p_deploy.errors import InputError, S2PError
from s2p_deploy.serve.http.middleware import LOG, note
from s2p_deploy.serve.http.problems import PROBLEMS, Problem, RequestProblem, problem_data, problem_of, request_id_of
from s2p_deploy.serve.request import (
    CancelledRequestError,
    ImageRequest,
    LoraWeight,
    RequestedControl,
    RequestedImagePrompt,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from PIL.Image import Image

    from s2p_deploy.serve.http.models import ServedModels
    from s2p_deploy.serve.request import RequestFuture
    from s2p_deploy.serve.service import ImageService, ModelInfo

GENERATIONS = "/v1/images/generations"
_TIMEOUT = "x-request-timeout"
_RANDOM_SEEDS = 2**32  # a number that every client can hold
_MOST_WEIGHT = 10.0  # of a LoRA; beyond 2 pictures dissolve
_POLL_SECONDS = 0.1  # between looks at the progress
_LONGEST_SILENCE = 15.0  # seconds; proxies close connections that are silent for 30 to 60
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
_UNBUFFERED = {"x-accel-buffering": "no"}  # a proxy that buffers would hold progress back


@dataclass(frozen=True)
class HttpLimits:
    """Bounds on what a client may request. Times are in seconds, ``body_bytes`` covers one request's body.

    Bodies with pictures may have ``upload_bytes``, and ``uploads`` of them are read at once; where ``adapter_pictures``
    come with prompts, for ControlNets and IP-Adapters, those of generations are such bodies too. A body that is a LoRA
    may have ``lora_bytes`` and take ``lora_seconds``, and one is read and registered at once. Of a body that is refused
    ``refused_bytes`` are read on, for as long as bodies may take. ``seconds`` is how long a
    request may take unless it asks for less. ``sizes`` are heights and widths in pixels that may be requested besides
    the model's own.
    """

    seconds: float = 120.0
    steps: int = 100
    pictures: int = 4
    prompt_characters: int = 2000
    guidance_scale: float = 50.0
    sizes: frozenset[tuple[int, int]] = frozenset()
    body_bytes: int = 2**20
    upload_bytes: int = 2**24
    uploads: int = 16
    adapter_pictures: bool = False
    lora_bytes: int = 2**29
    lora_seconds: float = 60.0
    body_seconds: float = 15.0
    refused_bytes: int = 2**26
    connections: int = 2000


class ControlForm(BaseModel):
    """A ControlNet that acts, by its name, and the picture that it reads: a PNG, JPEG or WebP file in base64."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    name: Annotated[str, Field(min_length=1, max_length=64)]
    image: Annotated[str, Field(min_length=1)]
    scale: Annotated[float, Field(ge=0, le=10, description="Strength.")] = 1.0
    start: Annotated[float, Field(ge=0, lt=1, description="Share of the steps after which it begins to act.")] = 0.0
    end: Annotated[float, Field(gt=0, le=1, description="Share of the steps after which it no longer acts.")] = 1.0


class ImagePromptForm(BaseModel):
    """An IP-Adapter that acts, by its name, and the picture that it reads: a PNG, JPEG or WebP file in base64."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    name: Annotated[str, Field(min_length=1, max_length=64)]
    image: Annotated[str, Field(min_length=1)]
    scale: Annotated[float, Field(ge=0, le=10, description="Strength.")] = 1.0


class LoraForm(BaseModel):
    """A LoRA that acts, by its name, and its weight."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    name: Annotated[str, Field(min_length=1, max_length=64)]
    weight: Annotated[float, Field(ge=-_MOST_WEIGHT, le=_MOST_WEIGHT)] = 1.0


class ImageForm(BaseModel):
    """The body of ``POST /v1/images/generations`` as far as OpenAI's is supported, and fields beyond it.

    What is left out or null comes from the model: OpenAI's clients send null for what nobody set.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    prompt: Annotated[str, Field(min_length=1)]
    model: str | None = None
    n: Annotated[int, Field(ge=1, description="Pictures; they get seed, seed + 1, ...")] = 1
    size: Annotated[str | None, Field(pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$")] = None
    response_format: Literal["b64_json"] = "b64_json"
    seed: Annotated[int | None, Field(ge=0, le=MOST_SEED)] = None
    num_inference_steps: Annotated[int | None, Field(ge=1)] = None
    guidance_scale: Annotated[float | None, Field(ge=0, description="Up to 1: without guidance.")] = None
    negative_prompt: str | None = None
    scheduler: Annotated[str | None, Field(max_length=64)] = None
    long_prompts: Annotated[bool, Field(description="Reads prompts longer than the text encoder in chunks.")] = False
    stream: Annotated[bool, Field(description="Server-sent events: progress, then the picture.")] = False
    controlnet: Annotated[list[ControlForm], Field(max_length=4)] = []
    ip_adapter: Annotated[list[ImagePromptForm], Field(max_length=4)] = []
    lora: Annotated[list[LoraForm], Field(max_length=16, description="LoRAs that act, of /v1/loras.")] = []

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, form: object) -> object:
        if not isinstance(form, dict):
            return form
        required = {name for name, field in cls.model_fields.items() if field.is_required()}
        return {name: value for name, value in form.items() if value is not None or name in required}

    def requests(self, info: ModelInfo, limits: HttpLimits) -> list[ImageRequest]:
        """Makes one request per picture.

        Raises:
            RequestProblem: more than a client may request, with the field at fault.
        """
        if self.n > limits.pictures:
            raise _refusal(f"n is {self.n}: 1 to {limits.pictures} are allowed", "n")
        if self.stream and self.n > 1:
            raise _refusal("stream draws one picture: leave n out", "stream")
        steps = self.num_inference_steps or info.steps
        if steps > limits.steps:
            raise _refusal(f"{steps} steps: 1 to {limits.steps} are allowed", "num_inference_steps")
        guidance = info.guidance_scale if self.guidance_scale is None else self.guidance_scale
        if guidance > limits.guidance_scale:
            raise _refusal(f"a guidance scale is from 0 to {limits.guidance_scale:g}", "guidance_scale")
        size, negative = self._size(info, limits), self.negative_prompt or ""
        if self.long_prompts and not info.long_prompts:
            raise _refusal("this model reads prompts of one chunk: leave long_prompts out", "long_prompts")
        _check_text(self.prompt, "prompt", limits)
        _check_text(negative, "negative_prompt", limits)
        seed = secrets.randbelow(_RANDOM_SEEDS) if self.seed is None else self.seed
        one = ImageRequest(
            self.prompt,
            steps,
            guidance,
            seed,
            negative,
            size,
            self.scheduler,
            self.long_prompts,
            controls=tuple(
                _control(each, f"controlnet.{number}", info, limits) for number, each in enumerate(self.controlnet)
            ),
            images=tuple(_image_prompt(each, f"ip_adapter.{at}", info) for at, each in enumerate(self.ip_adapter)),
            lora=tuple(LoraWeight(each.name, each.weight) for each in self.lora),
        )
        return [replace(one, seed=seed + number) for number in range(self.n)]

    def _size(self, info: ModelInfo, limits: HttpLimits) -> tuple[int, int] | None:
        """Parses height and width in pixels of ``WIDTHxHEIGHT``; None for the model's own size."""
        if self.size is None or self.size == "auto":
            return None
        width, _, height = self.size.partition("x")
        size = (int(height), int(width))
        if size == info.size:
            return None
        if size not in limits.sizes:
            raise _refusal(f"size {self.size} is not served: use {', '.join(_sizes(info, limits))}", "size")
        return size


def image_routes(models: ServedModels, limits: HttpLimits) -> APIRouter:
    """Makes the routes ``/v1/images/generations`` and ``/v1/models``."""
    router = APIRouter(responses=PROBLEMS)

    @router.post(GENERATIONS, dependencies=[Depends(_require_json)], responses=STREAMED)
    async def generate(form: ImageForm, request: Request) -> Response:
        """Draws pictures."""
        service = models.service(form.model)
        requests = await asyncio.to_thread(form.requests, service.info, limits)
        return await answer(service, requests, request, limits, stream=form.stream)

    @router.get("/v1/models")
    async def list_models() -> JSONResponse:
        """Lists the models that are served, with their defaults."""
        return JSONResponse({"object": "list", "data": [_described(name, models, limits) for name in models.names]})

    return router


async def answer(
    service: ImageService, requests: Sequence[ImageRequest], request: Request, limits: HttpLimits, *, stream: bool
) -> Response:
    """Draws requests and answers with their pictures, or as a stream with the progress of the only one.

    Raises:
        S2PError: what a request ended with. RequestProblem: the deadline is no time.
    """
    timeout, request_id = _timeout(request.headers.get(_TIMEOUT), limits), request_id_of(request.scope)
    note(request.scope, f"{len(requests)} x {requests[0].steps} steps")
    if stream:
        events = _events(service, requests[0], timeout, request_id)
        first = await anext(events)  # before the status is sent: what is refused gets a status of its own
        return StreamingResponse(_joined(first, events), media_type="text/event-stream", headers=_UNBUFFERED)
    with _submitted(service, requests, timeout, request_id) as futures:
        pictures = await _pictures(futures, request)
    data = await asyncio.to_thread(_encoded, pictures, requests)
    return JSONResponse({"created": int(time.time()), "data": data})


@contextmanager
def _submitted(
    service: ImageService, requests: Sequence[ImageRequest], timeout: float, request_id: str
) -> Iterator[list[RequestFuture]]:
    """Submits all requests or none; what is not done when the context is left is cancelled. Raises as ``submit``."""
    futures: list[RequestFuture] = []
    try:
        for number, request in enumerate(requests):
            own = request_id if len(requests) == 1 else f"{request_id}-{number}"
            futures.append(service.submit(request, timeout=timeout, id=own))
        yield futures
    finally:
        for future in futures:
            future.cancel()


async def _pictures(futures: Sequence[RequestFuture], request: Request) -> list[Image]:
    """Waits for all pictures.

    Raises:
        CancelledRequestError: the client has left. Otherwise what the first request that failed ended with.
    """
    left = asyncio.ensure_future(_disconnected(request))
    drawn = asyncio.gather(*map(asyncio.wrap_future, futures))
    waited: set[asyncio.Future[Any]] = {left, drawn}
    try:
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if not drawn.done():
            raise CancelledRequestError("the client has left")
        return drawn.result()
    finally:
        left.cancel()
        drawn.cancel()


async def _disconnected(request: Request) -> None:
    """Returns when the client has left; the request's body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(
    service: ImageService, request: ImageRequest, timeout: float, request_id: str
) -> AsyncIterator[bytes]:
    """Yields server-sent events. The first comes as soon as the request is accepted."""
    with _submitted(service, [request], timeout, request_id) as (future,):
        yield _event("image_generation.progress", {"done": 0, "total": 0})
        async for done, total in progress(future):
            yield _event("image_generation.progress", {"done": done, "total": total})
        try:
            picture = future.result()
        except Exception as error:  # the status is out already: the stream says it
            if not isinstance(error, S2PError):
                LOG.exception("%s failed", request_id)
            yield _event("error", problem_data(problem_of(error), request_id))
            return
    (image,) = await asyncio.to_thread(_encoded, [picture], [request])
    size = f"{picture.width}x{picture.height}"
    about = {"created_at": int(time.time()), "size": size, "output_format": "png"}
    yield _event("image_generation.completed", about | image)


async def progress(future: RequestFuture, silence: float = _LONGEST_SILENCE) -> AsyncIterator[tuple[int, int]]:
    """Yields calls of the denoiser done and all there will be, until the future is done.

    Whenever they change, and every ``silence`` seconds while they do not, so that no proxy takes a queue for an end.
    """
    ended, last, yielded = asyncio.Event(), (0, 0), time.monotonic()
    loop = asyncio.get_running_loop()
    future.add_done_callback(lambda _: loop.call_soon_threadsafe(ended.set))
    while not ended.is_set():
        if future.progress != last or time.monotonic() - yielded >= silence:
            last, yielded = future.progress, time.monotonic()
            yield last
        try:
            await asyncio.wait_for(ended.wait(), _POLL_SECONDS)
        except TimeoutError:
            continue


async def _joined(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for event in rest:
        yield event


def _event(kind: str, data: dict[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind} | data)}\n\n".encode()


def _encoded(pictures: list[Image], requests: Sequence[ImageRequest]) -> list[dict[str, Any]]:
    """Encodes pictures as PNG in base64, each with its seed."""
    images = []
    for picture, request in zip(pictures, requests, strict=True):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        images.append({"b64_json": base64.b64encode(buffer.getvalue()).decode("ascii"), "seed": request.seed})
    return images


def _described(name: str, models: ServedModels, limits: HttpLimits) -> dict[str, Any]:
    """Describes a model in OpenAI's form, with its defaults and limits once it is loaded."""
    service = models.loaded(name)
    about: dict[str, Any] = {"id": name, "object": "model", "created": 0, "owned_by": "s2p-deploy"}
    if service is None:
        return about | {"ready": False}
    info = service.info
    return about | {
        "ready": models.state == "ready",
        "engine": info.engine,
        "backend": info.backend,
        "precision": info.execution.precision,
        "provider": info.execution.provider,
        "optimization": info.execution.optimization,
        "recipe": info.recipe,
        "batching": info.batching,
        "batches": [{"samples": samples, "milliseconds": cost} for samples, cost in info.batches],
        "steps": info.steps,
        "most_steps": limits.steps,
        "guidance_scale": info.guidance_scale,
        "most_guidance_scale": limits.guidance_scale,
        "most_prompt_characters": limits.prompt_characters,
        "sizes": _sizes(info, limits),
        "schedulers": list(info.schedulers),
        "long_prompts": info.long_prompts,
        "controlnets": list(info.controlnets),
        "ip_adapters": list(info.ip_adapters),
        "lora_rank": info.lora_rank,
    }


def _control(form: ControlForm, param: str, info: ModelInfo, limits: HttpLimits) -> RequestedControl:
    """Reads what a ControlNet is given; ``param`` is its place in the form.

    Raises:
        RequestProblem: there is no such ControlNet, or its picture cannot be used.
    """
    if form.name not in info.controlnets:
        known = f"use {', '.join(info.controlnets)}" if info.controlnets else "this model has none"
        raise _refusal(f"there is no ControlNet {form.name!r}: {known}", f"{param}.name")
    if form.start >= form.end:
        raise _refusal(f"it would act from {form.start:g} to {form.end:g}: give an end above the start", f"{param}.end")
    picture = _picture(form.image, "control picture", f"{param}.image", (info.size, *sorted(limits.sizes)))
    return RequestedControl(form.name, picture, form.scale, form.start, form.end)


def _image_prompt(form: ImagePromptForm, param: str, info: ModelInfo) -> RequestedImagePrompt:
    """Reads what an IP-Adapter is given, as :func:`_control`; its picture may have any size."""
    if form.name not in info.ip_adapters:
        known = f"use {', '.join(info.ip_adapters)}" if info.ip_adapters else "this model has none"
        raise _refusal(f"there is no IP-Adapter {form.name!r}: {known}", f"{param}.name")
    return RequestedImagePrompt(form.name, _picture(form.image, "image prompt", f"{param}.image", None), form.scale)


def _picture(text: str, what: str, param: str, sizes: tuple[tuple[int, int], ...] | None) -> Image:
    """Decodes a picture in base64. Raises RequestProblem where there is none, or none of ``sizes``."""
    from s2p_deploy.pipeline.start_picture import read_picture  # with PyTorch: a server answers before that is loaded

    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise _refusal(f"the {what} is no base64: send a file's bytes in it", param) from error
    try:
        return read_picture(data, what, sizes)
    except InputError as error:
        raise _refusal(str(error), param) from error


def _sizes(info: ModelInfo, limits: HttpLimits) -> list[str]:
    return [f"{width}x{height}" for height, width in (info.size, *sorted(limits.sizes))]


def _timeout(header: str | None, limits: HttpLimits) -> float:
    """Parses how many seconds a request may take, as far as the server's limit."""
    if header is None:
        return limits.seconds
    try:
        seconds = float(header)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise _refusal(f"{_TIMEOUT} must be a number of seconds above 0", _TIMEOUT)
    return min(seconds, limits.seconds)


def _check_text(text: str, param: str, limits: HttpLimits) -> None:
    if len(text) > limits.prompt_characters:
        raise _refusal(f"a prompt of {len(text)} characters: {limits.prompt_characters} are allowed", param)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _refusal("a prompt must be text: it holds half a character", param) from error


def _require_json(request: Request) -> None:
    """Refuses a body that is not declared as JSON: a page of another site can send text or a form, but not that."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestProblem(Problem(415, "the body must be application/json (the Content-Type header says otherwise)"))
    check_encoding(request)


def check_encoding(request: Request) -> None:
    """Refuses a compressed body, whose size says nothing. Raises RequestProblem."""
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise RequestProblem(Problem(415, "the body must not be compressed (the Content-Encoding header says it is)"))


def _refusal(message: str, param: str) -> RequestProblem:
    return RequestProblem(Problem(400, message, param))
