"""LoRAs by name over HTTP: listed for every client, registered and removed where the server knows its clients."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from s2p_deploy.errors import InputError, S2PError
from s2p_deploy.serve.http.images import check_encoding
from s2p_deploy.serve.http.problems import PROBLEMS, Problem, RequestProblem

if TYPE_CHECKING:
    from s2p_deploy.serve.http.models import ServedModels
    from s2p_deploy.serve.loras import ServedLora, ServedLoras

LORAS = "/v1/loras/"  # and a name
_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


def lora_routes(models: ServedModels, refusal: str | None) -> APIRouter:
    """Makes the routes ``/v1/loras``. ``refusal`` says why none can be registered or removed (None: they can)."""
    router = APIRouter(responses=PROBLEMS)

    def registered(model: str | None) -> ServedLoras:
        if refusal is not None:
            raise RequestProblem(Problem(403, refusal, code="registration_closed"))
        return models.service(model).loras

    @router.get("/v1/loras")
    async def list_loras(model: str | None = None) -> JSONResponse:
        """Lists the LoRAs of a model, the first one where none is named."""
        loras = models.service(model).loras
        about = {"lora_rank": loras.rank, "most_bytes": loras.most_bytes}
        return JSONResponse({"object": "list", "data": [_described(one) for one in loras.all]} | about)

    @router.put(f"{LORAS}{{name}}", status_code=201, openapi_extra=_BODY)
    async def put_lora(name: str, request: Request, model: str | None = None) -> JSONResponse:
        """Registers a LoRA, a whole file in safetensors, or replaces the one of that name for requests from now on."""
        loras = registered(model)
        check_encoding(request)
        added = await asyncio.to_thread(_added, loras, name, await request.body())
        return JSONResponse(_described(added), 201)

    @router.delete(f"{LORAS}{{name}}", status_code=204, response_class=Response)
    async def delete_lora(name: str, model: str | None = None) -> Response:
        """Removes a LoRA; requests that were accepted with it are drawn with it."""
        registered(model).remove(name)
        return Response(status_code=204)

    return router


def _added(loras: ServedLoras, name: str, body: bytes) -> ServedLora:
    """Registers the LoRA of a body. Raises InputError where it cannot be used."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "body")
        file.write_bytes(body)
        try:
            return loras.add(name, file)
        except S2PError as error:  # which names a file that the client does not know
            raise InputError(str(error).replace(str(file), name)) from error


def _described(lora: ServedLora) -> dict[str, Any]:
    changed = sorted({layer.component for layer in lora.text.layers})
    return {"name": lora.name, "rank": lora.matrices.rank, "bytes": lora.bytes, "text_encoders": changed}
