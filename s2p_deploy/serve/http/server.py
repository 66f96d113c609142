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
from uvicorn.server import HANDLED_SIGNALS

from s2p_deploy.errors import InputError
from s2p_deploy.serve.http.app import create_app
from s2p_deploy.serve.http.gate import LOOPBACK, Doorkeeper
from s2p_deploy.serve.http.request_log import LOG

if TYPE_CHECKING:
    from types import FrameType

    from fastapi import FastAPI

    from s2p_deploy.serve.http.limits import HttpLimits
    from s2p_deploy.serve.http.metrics import Metrics
    from s2p_deploy.serve.http.served_models import ServedModels

_BACKLOG = 2048
_LAST_WORDS = 5  # seconds for answers that are being written when everything was drawn or stopped


@dataclass(frozen=True)
class Listening:
    """A socket that takes connections already; nobody answers them yet."""

    socket: socket.socket
    host: str

    @property
    def url(self) -> str:
        """Where it is, with the port that was chosen."""
        address, port = self.socket.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        return f"http://{shown}:{port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return ipaddress.ip_address(self.socket.getsockname()[0]).is_loopback


def listen(host: str, port: int) -> Listening:
    """Takes a port (0: any that is free).

    Raises:
        InputError: it cannot be had, or there is no such host.
    """
    found: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(_BACKLOG)
    except (OSError, UnicodeError) as error:
        if found is not None:
            found.close()
        reason = error.strerror if isinstance(error, OSError) else "no name of a host"
        raise InputError(f"cannot listen on {host}:{port} ({reason}): choose another --host or --port") from error
    return Listening(found, host)


def run_server(
    models: ServedModels,
    limits: HttpLimits,
    metrics: Metrics,
    listening: Listening,
    *,
    token: str | None = None,
    drain_seconds: float = 30.0,
) -> None:
    """Serves until SIGTERM or SIGINT: then takes nothing new, finishes what it can, and returns.

    Raises:
        KeyboardInterrupt: it was SIGINT. Otherwise whatever stopped a model from loading.
    """
    _log_to_stderr()
    hosts = LOOPBACK | {listening.host.lower()} if listening.is_loopback else None
    if hosts is None and token is None:
        LOG.warning("everyone who reaches %s may ask: --token-file FILE asks for a token", listening.url)
    server = DrainingServer(
        create_app(models, limits, metrics, Doorkeeper(hosts, token)), models, limits, drain_seconds
    )
    server.run(sockets=[listening.socket])
    if models.failure is not None:
        raise models.failure
    if server.signal == signal.SIGINT:
        raise KeyboardInterrupt


class DrainingServer(uvicorn.Server):
    """uvicorn that drains on the first signal while it still answers, and gives up what is left on the second."""

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
                timeout_graceful_shutdown=_LAST_WORDS,
            )
        )
        self.signal: int | None = None
        self._signals_kept = False
        self._models, self._drain_seconds = models, drain_seconds

    async def on_tick(self, counter: int) -> bool:
        """Whether to end: also where a model cannot be loaded."""
        if not self._signals_kept and self._models.state == "ready":
            self._keep_signals()
        return await super().on_tick(counter) or self._models.failure is not None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """What a signal does."""
        first, self.signal = self.signal is None, self.signal or sig
        threading.Thread(target=self._drain if first else self._end, name="end", daemon=True).start()

    def _keep_signals(self) -> None:
        """Takes the signals back from what was loaded: Ray's own handler ends the process with SIGABRT."""
        self._signals_kept = True
        if threading.current_thread() is threading.main_thread():
            for sig in HANDLED_SIGNALS:
                signal.signal(sig, self.handle_exit)

    def _drain(self) -> None:
        LOG.info("closing: requests that run have %g s", self._drain_seconds)
        if not self._models.drain(self._drain_seconds):
            LOG.warning("some requests were not done in time")
        self._end()

    def _end(self) -> None:
        self._models.close()  # what is left is answered 503
        self.should_exit = True


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    LOG.handlers = [handler]
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
