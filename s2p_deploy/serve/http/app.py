"""The application: routes, what stands before them, and how errors are answered."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from s2p_deploy import __version__
from s2p_deploy.errors import S2PError
from s2p_deploy.serve.http.body_limit import BodyLimit
from s2p_deploy.serve.http.gate import Gate
from s2p_deploy.serve.http.image_form import ImageForm
from s2p_deploy.serve.http.image_routes import image_routes
from s2p_deploy.serve.http.kserve_routes import kserve_routes
from s2p_deploy.serve.http.metrics import CONTENT_TYPE
from s2p_deploy.serve.http.page_routes import page_routes
from s2p_deploy.serve.http.problems import PROBLEMS, Problem, RequestProblem, problem_of, problem_response
from s2p_deploy.serve.http.request_log import LOG, RequestLog
from s2p_deploy.serve.http.security_headers import SecurityHeaders

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from s2p_deploy.serve.http.gate import Doorkeeper
    from s2p_deploy.serve.http.limits import HttpLimits
    from s2p_deploy.serve.http.metrics import Metrics
    from s2p_deploy.serve.http.served_models import ServedModels


def create_app(models: ServedModels, limits: HttpLimits, metrics: Metrics, doorkeeper: Doorkeeper) -> FastAPI:
    """The application. ``models`` begin to load when it starts, and are closed when it ends."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        models.start()
        yield
        await asyncio.to_thread(models.close)

    title = "s2p-deploy serve"  # no page of FastAPI's: they load scripts from elsewhere
    app = FastAPI(title=title, version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    for routes in (image_routes(models, limits), kserve_routes(models, limits), _own_routes(models, metrics)):
        app.include_router(routes)
    app.include_router(page_routes())
    for kind in (S2PError, RequestProblem, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _answered)
    app.add_middleware(BodyLimit, limits=limits)  # the last one added is the first one asked
    app.add_middleware(Gate, doorkeeper=doorkeeper)
    app.add_middleware(SecurityHeaders)
    app.add_middleware(RequestLog, metrics=metrics)
    return app


def _own_routes(models: ServedModels, metrics: Metrics) -> APIRouter:
    router = APIRouter(responses=PROBLEMS)

    @router.get("/health")
    async def health() -> JSONResponse:
        """200 once every model is loaded and warm."""
        state = models.state if models.alive else "stopped"
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    @router.get("/metrics", response_class=Response)
    async def numbers() -> Response:
        """In Prometheus's text format."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    return router


async def _answered(request: Request, error: Exception) -> Response:
    match error:
        case RequestValidationError():
            problem = _problem_of_form(error.errors()[0])
        case HTTPException():
            problem = Problem(error.status_code, str(error.detail), headers=tuple((error.headers or {}).items()))
        case _:
            problem = problem_of(error)
    if problem.status == 500:
        LOG.error("%s failed", request.scope["state"]["request_id"], exc_info=error)
    return problem_response(problem, request.scope)


def _problem_of_form(error: dict[str, Any]) -> Problem:
    """The first thing that is wrong with a form."""
    field = ".".join(str(part) for part in error["loc"][1:])
    match error["type"]:
        case "json_invalid":
            return Problem(400, f"the body is not JSON: {error['ctx']['error']}")
        case "extra_forbidden":
            return Problem(400, f"{field} is not supported: there are {', '.join(ImageForm.model_fields)}", field)
        case "missing" if field:
            return Problem(400, f"{field} is missing", field)
        case _:
            return Problem(400, f"{field or 'the body'}: {error['msg']}", field or None)
