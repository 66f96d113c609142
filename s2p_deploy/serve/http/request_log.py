"""Every request's id, its line on stderr, and the answer to what nobody expected. Prompts are not logged."""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders

from s2p_deploy.serve.http.problems import CLIENT_LEFT, printable, problem_of, problem_response

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from s2p_deploy.serve.http.metrics import Metrics

LOG = logging.getLogger("s2p_deploy.serve")
_HEADER = "x-request-id"
_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")


class RequestLog:
    """ASGI middleware, the outermost. An id that a client gives is kept where it is 1 to 64 letters, digits, ._:- ."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, with its id in ``scope["state"]["request_id"]`` and in the answer's headers."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _id_of(Headers(scope=scope).get(_HEADER))
        scope.setdefault("state", {})["request_id"] = request_id
        start, status = time.monotonic(), CLIENT_LEFT

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[_HEADER] = request_id
            await send(message)

        try:
            await self._app(scope, receive, tell)
        except Exception as error:  # a defect: the client is told no more than that
            LOG.exception("%s failed", request_id)
            if status == CLIENT_LEFT:
                await problem_response(problem_of(error), scope)(scope, receive, tell)
            status = 500
        finally:
            self._metrics.answered(status)
            _log(scope, status, time.monotonic() - start)


def note(scope: Scope, text: str) -> None:
    """Something to say in the request's line, of what the server knows; never of what a client wrote."""
    scope["state"]["note"] = text


def _log(scope: Scope, status: int, seconds: float) -> None:
    state, path = scope["state"], printable(scope["path"])
    said = f", {state['note']}" if "note" in state else ""
    level = logging.INFO if scope["method"] == "POST" or status not in {200, 503} else logging.DEBUG
    LOG.log(level, "%s %s %s %d, %.3f s%s", state["request_id"], scope["method"], path, status, seconds, said)


def _id_of(given: str | None) -> str:
    return given if given and _ID.fullmatch(given) else uuid.uuid4().hex
