"""KServe's v2 protocol: health, metadata, and inference from prompts to pixels."""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from s2p_deploy import __version__
from s2p_deploy.serve.http.asked import MOST_SEED, TIMEOUT, check_limits, seconds_allowed
from s2p_deploy.serve.http.content_types import BYTES, JSON, takes_tensors
from s2p_deploy.serve.http.problems import PROBLEMS, Problem, RequestProblem, not_ready, refusal, request_id_of
from s2p_deploy.serve.http.request_log import note
from s2p_deploy.serve.http.tensor_forms import (
    BINARY_LENGTH,
    InferForm,
    Tensor,
    described_request,
    read_request,
    written_answer,
)
from s2p_deploy.serve.http.tickets import pictures, taken
from s2p_deploy.serve.request import ImageRequest

if TYPE_CHECKING:
    from PIL.Image import Image

    from s2p_deploy.serve.facts import ServiceFacts
    from s2p_deploy.serve.http.limits import HttpLimits
    from s2p_deploy.serve.http.served_models import ServedModels

_VERSION, _IMAGE = "1", "image"
_INPUTS = {"prompt": "BYTES", "negative_prompt": "BYTES", "steps": "INT32", "guidance_scale": "FP32", "seed": "INT64"}
_BINARY, _BINARY_OUTPUTS = "binary_data", "binary_data_output"
_TENSORS: dict[int | str, dict[str, Any]] = {200: {"content": {BYTES: {}}}}
_TAKES = [Depends(takes_tensors)]
_BODY = {"requestBody": {"required": True, "content": {"application/json": {"schema": described_request()}}}}


def kserve_routes(models: ServedModels, limits: HttpLimits) -> APIRouter:
    """Everything below ``/v2``."""
    router = APIRouter(prefix="/v2", responses=PROBLEMS)
    _add_health(router, models)
    _add_models(router, models)

    @router.post("/models/{name}/infer", openapi_extra=_BODY, dependencies=_TAKES, responses=_TENSORS)
    @router.post(
        "/models/{name}/versions/{version}/infer", openapi_extra=_BODY, dependencies=_TAKES, responses=_TENSORS
    )
    async def infer(name: str, request: Request, version: str = _VERSION) -> Response:
        """Draws a picture per prompt: UINT8 [n, H, W, 3]."""
        _check_version(version)
        service = models.service(name)
        form, tensors = read_request(await request.body(), request.headers.get(BINARY_LENGTH))
        binary = _wants_binary(form)
        asked = _requests(tensors, service.facts, limits)
        timeout = seconds_allowed(request.headers.get(TIMEOUT), limits)
        note(request.scope, f"{len(asked)} x {asked[0].steps} steps")
        with taken(service, asked, timeout, request_id_of(request.scope)) as tickets:
            drawn = await pictures(tickets, request)
        about = {"model_name": name, "model_version": _VERSION} | ({} if form.id is None else {"id": form.id})
        body, head = await asyncio.to_thread(_written, about, drawn, binary=binary)
        if not binary:
            return Response(body, media_type=JSON)
        return Response(body, media_type=BYTES, headers={BINARY_LENGTH: str(head)})

    return router


def _add_health(router: APIRouter, models: ServedModels) -> None:
    @router.get("")
    async def server() -> JSONResponse:
        """What this server is."""
        return JSONResponse({"name": "s2p-deploy", "version": __version__, "extensions": ["binary_tensor_data"]})

    @router.get("/health/live")
    async def live() -> JSONResponse:
        """Whether the process is worth keeping."""
        return JSONResponse({"live": models.alive}, 200 if models.alive else 503)

    @router.get("/health/ready")
    async def ready() -> JSONResponse:
        """Whether every model is loaded and warm."""
        found = models.state == "ready" and models.alive
        return JSONResponse({"ready": found}, 200 if found else 503)


def _add_models(router: APIRouter, models: ServedModels) -> None:
    @router.get("/models/{name}")
    @router.get("/models/{name}/versions/{version}")
    async def metadata(name: str, version: str = _VERSION) -> JSONResponse:
        """The tensors of a model."""
        _check_version(version)
        facts = models.service(name).facts
        inputs = [{"name": one, "datatype": kind, "shape": [-1]} for one, kind in _INPUTS.items()]
        outputs = [{"name": _IMAGE, "datatype": "UINT8", "shape": [-1, *facts.size, 3]}]
        about: dict[str, Any] = {"name": name, "versions": [_VERSION], "platform": f"s2p_deploy_{facts.backend}"}
        return JSONResponse(about | {"inputs": inputs, "outputs": outputs})

    @router.get("/models/{name}/ready")
    @router.get("/models/{name}/versions/{version}/ready")
    async def model_ready(name: str, version: str = _VERSION) -> JSONResponse:
        """Whether a model is loaded and warm."""
        _check_version(version)
        if not models.service(name).alive:
            raise not_ready(f"model {name!r} has stopped")
        return JSONResponse({"name": name, "ready": True})


def _check_version(version: str) -> None:
    if version != _VERSION:
        raise RequestProblem(Problem(404, f"there is no version {version!r}: there is {_VERSION}"))


def _wants_binary(form: InferForm) -> bool:
    """Whether the picture is to come as bytes."""
    unknown = [name for name in form.parameters if name != _BINARY_OUTPUTS]
    unknown += [name for output in form.outputs or () for name in output.parameters if name != _BINARY]
    if unknown:
        raise refusal(f"parameter {unknown[0]!r} is not supported")
    if any(output.name != _IMAGE for output in form.outputs or ()):
        raise refusal(f"there is one output, {_IMAGE!r}")
    asked = [output.parameters.get(_BINARY) for output in form.outputs or ()]
    wanted = next((one for one in asked if one is not None), form.parameters.get(_BINARY_OUTPUTS, False))
    return wanted is True


def _requests(tensors: dict[str, Tensor], facts: ServiceFacts, limits: HttpLimits) -> list[ImageRequest]:
    """One request per prompt. Other inputs have one value for all, or one for each."""
    for name, tensor in tensors.items():
        if _INPUTS.get(name) != tensor.datatype:
            known = ", ".join(f"{one} ({kind})" for one, kind in _INPUTS.items())
            raise refusal(f"input {name!r} of {tensor.datatype} is not taken: there are {known}")
    prompts = tensors["prompt"].values if "prompt" in tensors else ()
    if not prompts:
        raise refusal("the input prompt is missing")
    count = len(prompts)
    first = secrets.randbelow(2**32)
    given = {name: tensor.values for name, tensor in tensors.items()}
    seeds = given.get("seed", (first,))
    if not all(0 <= seed <= MOST_SEED for seed in seeds):
        raise refusal("a seed is from 0 on")
    found = zip(
        prompts,
        _spread("steps", given.get("steps", (facts.steps,)), count),
        _spread("guidance_scale", given.get("guidance_scale", (facts.guidance_scale,)), count),
        range(seeds[0], seeds[0] + count) if len(seeds) == 1 else _spread("seed", seeds, count),
        _spread("negative_prompt", given.get("negative_prompt", ("",)), count),
        strict=True,
    )
    requests = [ImageRequest(*one) for one in found]
    check_limits(requests, limits)
    return requests


def _spread(name: str, values: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    if len(values) not in {1, count}:
        raise refusal(f"input {name!r} has {len(values)} values for {count} prompts: give one, or one for each")
    return values * count if len(values) == 1 else values


def _written(about: dict[str, Any], drawn: list[Image], *, binary: bool) -> tuple[bytes, int]:
    pixels = np.stack([np.asarray(picture.convert("RGB"), np.uint8) for picture in drawn])
    return written_answer(about, _IMAGE, pixels, binary=binary)
