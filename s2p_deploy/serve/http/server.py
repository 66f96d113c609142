"""The server's process: a socket, uvicorn, and an orderly end."""

from __future__ import annotations

import ipaddress
import logging
import signal
import socket
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import uvicorn

from s2p_deploy.errors import InputError
from s2p_deploy.serve.http.app import create_app
from s2p_deploy.serve.http.middleware import LOG, LOOPBACK

if TYPE_CHECKING:
    from types import FrameType

    from fastapi import FastAPI

    from s2p_deploy.serve.http.images import HttpLimits
    from s2p_deploy.serve.http.metrics import Metrics
    from s2p_deploy.serve.http.models import ServedModels

_BACKLOG = 2048
_LAST_RESPONSES = 5  # seconds for those that are being written when everything was drawn or stopped


@dataclass(frozen=True)
class Listening:
    """A socket that accepts connections already; nobody answers them yet."""

    socket: socket.socket
    host: str

    @property
    def url(self) -> str:
        """Returns the server's address, with the port that was chosen."""
        address, port = self.socket.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        return f"http://{shown}:{port}"

    @property
    def is_loopback(self) -> bool:
        """Returns whether only this machine can reach it."""
        return ipaddress.ip_address(self.socket.getsockname()[0]).is_loopback


def listen(host: str, port: int) -> Listening:
    """Binds a port (0: any that is free).

    Raises:
        InputError: it cannot be had, or there is no such host.
    """
    bound: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(_BACKLOG)
    except (OSError, UnicodeError) as error:
        if bound is not None:
            bound.close()
        reason = error.strerror if isinstance(error, OSError) else "no name of a host"
        raise InputError(f"cannot listen on {host}:{port} ({reason}): choose another --host or --port") from error
    return Listening(bound, host)


def run_server(
    models: ServedModels,
    limits: HttpLimits,
    metrics: Metrics,
    listening: Listening,
    *,
    token: str | None = None,
    drain_seconds: float = 30.0,
) -> None:
    """Serves until SIGTERM or SIGINT: then accepts nothing new, finishes what it can, and returns.

    Raises:
        KeyboardInterrupt: it was SIGINT. Otherwise whatever stopped a model from loading.
    """
    log_to_stderr()
    app = create_app(models, limits, metrics, hosts=allowed_hosts(listening, token), token=token)
    server = DrainingServer(app, models, limits, drain_seconds)
    server.run(sockets=[listening.socket])
    if models.failure is not None:
        raise models.failure
    if server.signal == signal.SIGINT:
        raise KeyboardInterrupt


def allowed_hosts(listening: Listening, token: str | None) -> frozenset[str] | None:
    """Returns the names that a Host header may have (None: any); warns where anyone may use the server."""
    if listening.is_loopback:
        return LOOPBACK | {listening.host.lower()}
    if token is None:
        LOG.warning("everyone who reaches %s may use it: --token-file FILE requires a token", listening.url)
    return None


class DrainingServer(uvicorn.Server):
    """A uvicorn server that drains on the first signal while it still answers, and stops on the second."""

    def __init__(self, app: FastAPI, models: ServedModels, limits: HttpLimits, drain_seconds: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                limit_concurrency=limits.connections,
                timeout_graceful_shutdown=_LAST_RESPONSES,
            )
        )
        self.signal: int | None = None
        self._models, self._drain_seconds = models, drain_seconds

    async def on_tick(self, counter: int) -> bool:
        """Returns whether to end: also where a model cannot be loaded."""
        return await super().on_tick(counter) or self._models.failure is not None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drains on the first signal, stops on the second."""
        first, self.signal = self.signal is None, self.signal or sig
        threading.Thread(target=self._drain if first else self._end, name="end", daemon=True).start()

    def _drain(self) -> None:
        LOG.info("closing: requests that run have %g s", self._drain_seconds)
        if not self._models.drain(self._drain_seconds):
            LOG.warning("some requests were not done in time")
        self._end()

    def _end(self) -> None:
        self._models.close()  # what is left is answered 503
        self.should_exit = True


def log_to_stderr() -> None:
    """Writes the log of the server, and of nothing else, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    LOG.handlers = [handler]
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
