"""The ASGI application: routes, middlewares, the page, and how errors are answered."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from importlib import resources
from typing import TYPE_CHECKING

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from s2p_deploy import __version__
from s2p_deploy.errors import S2PError
from s2p_deploy.serve.http.edits import EDITS, VARIATIONS, edit_routes
from s2p_deploy.serve.http.images import GENERATIONS, HttpLimits, ImageForm, image_routes
from s2p_deploy.serve.http.loras import LORAS, lora_routes
from s2p_deploy.serve.http.metrics import CONTENT_TYPE, Metrics
from s2p_deploy.serve.http.middleware import (
    LOG,
    AuthMiddleware,
    BodyLimitMiddleware,
    RequestLogMiddleware,
    UnreadBodyMiddleware,
    Uploads,
)
from s2p_deploy.serve.http.problems import (
    PROBLEMS,
    Problem,
    RequestProblem,
    invalid_form,
    problem_of,
    problem_response,
    unreadable_json,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from s2p_deploy.serve.http.models import ServedModels

_PAGE_TYPES = {
    "index.html": "text/html",
    "page.css": "text/css",
    "page.js": "text/javascript",
    "picture.js": "text/javascript",
}


def create_app(
    models: ServedModels,
    limits: HttpLimits,
    metrics: Metrics,
    *,
    hosts: frozenset[str] | None = None,
    token: str | None = None,
    replica: bool = False,
) -> FastAPI:
    """Makes the application. ``models`` begin to load when it starts, and are closed when it ends.

    Args:
        models: what is served.
        limits: bounds on what a client may request.
        metrics: where the models' services are observed already.
        hosts: names that a Host header may have (None: any).
        token: what a client must bring (None: nothing).
        replica: whether others serve the same models, which would not learn of what is registered here.
    """

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        models.start()
        yield
        await asyncio.to_thread(models.close)

    title = "s2p-deploy serve"  # no page of FastAPI's: they load scripts from elsewhere
    app = FastAPI(title=title, version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.include_router(image_routes(models, limits))
    app.include_router(edit_routes(models, limits))
    app.include_router(lora_routes(models, _no_registration(token, replica=replica)))
    app.include_router(_server_routes(models, metrics))
    app.include_router(_page_routes())
    for kind in (S2PError, RequestProblem, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _error_response)
    paths = (EDITS, VARIATIONS, GENERATIONS) if limits.adapter_pictures else (EDITS, VARIATIONS)
    pictures = Uploads(paths, limits.upload_bytes, limits.body_seconds, limits.uploads, above=limits.body_bytes)
    loras = Uploads((LORAS,), limits.lora_bytes, limits.lora_seconds, at_once=1, until_answered=True)
    app.add_middleware(BodyLimitMiddleware, limits=limits, uploads=(pictures, loras))  # the last one is the outermost
    app.add_middleware(AuthMiddleware, hosts=hosts, token=token)
    app.add_middleware(RequestLogMiddleware, metrics=metrics)
    app.add_middleware(UnreadBodyMiddleware, limits=limits)
    return app


def _no_registration(token: str | None, *, replica: bool) -> str | None:
    """Says why clients cannot register LoRAs; None where they can."""
    if replica:
        return "LoRAs of a server with replicas are given at its start: serve --lora NAME=FILE"
    if token is None:
        return (
            "LoRAs are registered at the start (serve --lora NAME=FILE), or where a token is asked for (--token-file)"
        )
    return None


def _server_routes(models: ServedModels, metrics: Metrics) -> APIRouter:
    router = APIRouter(responses=PROBLEMS)

    @router.get("/health/live")
    async def live() -> JSONResponse:
        """Returns 200 while the process is worth keeping, also while it loads."""
        return JSONResponse({"live": models.alive}, 200 if models.alive else 503)

    @router.get("/health/ready")
    async def ready() -> JSONResponse:
        """Returns 200 once every model is loaded and warm, until the server drains."""
        state = models.state if models.alive else "stopped"
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    @router.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        """Returns metrics in Prometheus's text format."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    return router


def _page_routes() -> APIRouter:
    """Makes ``/`` and ``/page/NAME``: files of this package, and nothing from elsewhere."""
    router = APIRouter(include_in_schema=False)
    folder = resources.files("s2p_deploy") / "serve" / "http" / "page"
    files = {name: (folder / name).read_bytes() for name in _PAGE_TYPES}

    @router.get("/")
    async def index() -> Response:
        """Returns the page."""
        return Response(files["index.html"], media_type=_PAGE_TYPES["index.html"])

    @router.get("/page/{name}")
    async def asset(name: str) -> Response:
        """Returns a style sheet or a script of the page."""
        if name not in files:
            raise RequestProblem(Problem(404, "there is no such file"))
        return Response(files[name], media_type=_PAGE_TYPES[name])

    return router


async def _error_response(request: Request, error: Exception) -> Response:
    match error:
        case RequestValidationError():
            first = error.errors()[0]
            problem = invalid_form({**first, "loc": first["loc"][1:]}, ImageForm.model_fields)
        case HTTPException():
            headers = tuple((error.headers or {}).items())
            problem = Problem(error.status_code, str(error.detail), headers=headers)
            problem = unreadable_json(error.__cause__) or problem  # of which FastAPI says only that there was an error
        case _:
            problem = problem_of(error)
    if problem.status == 500:
        LOG.error("%s failed", request.scope["state"]["request_id"], exc_info=error)
    return problem_response(problem, request.scope)
