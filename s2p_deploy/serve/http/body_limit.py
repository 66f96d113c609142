"""A request's body, read to its end before anything looks at it: as long as it may be, as slow as it may be."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from starlette.datastructures import Headers

from s2p_deploy.serve.http.problems import Problem, RequestProblem, problem_response

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from s2p_deploy.serve.http.limits import HttpLimits


class BodyLimit:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, limits: HttpLimits) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on with its whole body, or answers 413 or 408."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                body = await self._body(scope, receive)
        except (RequestProblem, TimeoutError) as error:
            problem = error.problem if isinstance(error, RequestProblem) else Problem(408, "the body came too slowly")
            await problem_response(problem, scope)(scope, receive, send)
            return
        if body is not None:
            await self._app(scope, _replayed(body, receive), send)

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """None where the client left before it ended."""
        too_long = RequestProblem(Problem(413, f"the body may have {self._limits.body_bytes} bytes"))
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._limits.body_bytes:
            raise too_long
        found = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            found += message.get("body", b"")
            if len(found) > self._limits.body_bytes:  # a body in chunks says no length
                raise too_long
            if not message.get("more_body", False):
                return bytes(found)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """``body`` in one piece, and then whatever comes: the word that the client has left."""
    told = False

    async def replay() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
