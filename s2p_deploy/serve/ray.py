"""Ray Serve: replicas of an engine, one per device, each the whole application of ``serve`` behind Ray's own proxy.

Ray runs code by design, so nobody without the cluster's token may reach it: its token mode is always on.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2p_deploy.context import Context
from s2p_deploy.errors import InputError, IntegrityError, MissingEnvironmentError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fastapi import FastAPI

    from s2p_deploy.families import BasePipeline
    from s2p_deploy.records import Engine
    from s2p_deploy.serve.http.images import HttpLimits
    from s2p_deploy.serve.service import ServiceSettings

LOG = logging.getLogger("s2p_deploy.serve")
MODE, TOKEN, TOKEN_FILE = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_OLDEST_RAY = (2, 60)  # with tokens, and an ingress whose application is built in the replica
_MOST_REPLICAS = 256
_MOST_PORT = 65535
_CONNECT_SECONDS = 10.0
_STORE_BYTES = 100 * 2**20  # nothing passes through Ray's object store
# On Linux Ray puts the address that other machines reach this one by in the place of 127.0.0.1.
_LOOPBACK = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
_SYSTEM = {
    "worker_niceness": 0,  # replicas are what the machine is for; Ray's own choice is 15
    "agent_register_timeout_ms": 120_000,  # a busy machine imports for long
    "worker_register_timeout_seconds": 300,
}
_SPARE_REQUESTS = 64  # that a replica answers beside pictures: health, metrics, models, refusals
_END_SECONDS = 30.0  # that Ray takes to end replicas which have finished
_QUIET = {"log_level": "WARNING"}


@dataclass(frozen=True)
class RaySettings:
    """``replicas`` of an engine, each on a GPU of its own or on ``cpus`` cores.

    ``address`` is that of a cluster to join (None: one of this process's own, on this machine). Requests that run when
    the replicas are stopped have ``drain_seconds``.
    """

    replicas: int = 1
    address: str | None = None
    cpus: float = 1.0
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        if not 1 <= self.replicas <= _MOST_REPLICAS:
            raise InputError(f"{self.replicas} replicas: give 1 to {_MOST_REPLICAS}")
        if self.cpus <= 0:
            raise InputError(f"{self.cpus} cores for a replica: give more than 0")


@dataclass(frozen=True)
class ReplicaSpec:
    """The application of a replica: folders that every machine of the cluster sees, and what must be in them.

    ``hosts`` and ``token`` are as for :func:`s2p_deploy.serve.http.app.create_app`, ``context`` as for
    :func:`s2p_deploy.serve.service.open_service`.
    """

    engine: str
    digest: str
    base: str
    name: str
    on_gpu: bool
    settings: ServiceSettings
    limits: HttpLimits
    hosts: frozenset[str] | None = None
    token: str | None = None
    context: Context = Context()

    @staticmethod
    def of(  # noqa: PLR0913 - its fields
        engine: Engine,
        base: BasePipeline,
        name: str,
        settings: ServiceSettings,
        limits: HttpLimits,
        *,
        hosts: frozenset[str] | None = None,
        token: str | None = None,
        context: Context = Context(),
    ) -> ReplicaSpec:
        """Describes an engine and its pipeline by their folders, or a pipeline of a hub by its name."""
        return ReplicaSpec(
            engine=str(engine.folder.resolve()),
            digest=engine.manifest.digest,
            base=base.place,
            name=name,
            on_gpu=engine.environment.get("device") == "CUDA GPU",
            settings=settings,
            limits=limits,
            hosts=hosts,
            token=token,
            context=context,
        )


class Replica:
    """An engine and its application in a process of Ray's; ``serve.ingress`` makes it answer HTTP.

    Raises:
        IntegrityError: the engine or the pipeline here is not the one that is served. Otherwise as ``open_service``.
    """

    def __init__(self, spec: ReplicaSpec) -> None:
        from s2p_deploy.families import resolve_base
        from s2p_deploy.records import Engine
        from s2p_deploy.serve.http.metrics import Metrics
        from s2p_deploy.serve.service import open_service

        engine, base = Engine.open(Path(spec.engine)), resolve_base(spec.base)
        if engine.manifest.digest != spec.digest or base.base.digest != engine.manifest.base.digest:
            raise IntegrityError(f"{spec.engine} or {spec.base} is another one on this machine (its digest differs)")
        self._spec, self._metrics = spec, Metrics()
        observer = self._metrics.observer(spec.name)
        self._service = open_service(engine, base, spec.settings, observer, spec.name, spec.context)
        self._metrics.watch(spec.name, self._service)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Makes the application, whose only model is loaded already."""
        from s2p_deploy.serve.http.app import create_app
        from s2p_deploy.serve.http.models import ServedModels
        from s2p_deploy.serve.http.server import log_to_stderr

        log_to_stderr()
        spec = self._spec
        models = ServedModels({spec.name: lambda: self._service})
        return create_app(models, spec.limits, self._metrics, hosts=spec.hosts, token=spec.token, replica=True)

    def check_health(self) -> None:
        """Raises RuntimeError where nothing is drawn any more: Ray then replaces the replica."""
        if not self._service.alive:
            raise RuntimeError("the generation loop has ended, or the engine fails every call")


def serve_replicas(
    spec: ReplicaSpec, settings: RaySettings, host: str, port: int, on_ready: Callable[[float], None]
) -> None:
    """Serves until SIGTERM or SIGINT; then accepts nothing new, finishes what runs, and ends the replicas.

    ``on_ready`` is called with the seconds that the start took. A second signal does not wait for what runs. Call it in
    the main thread: Linux ends what Ray starts together with the thread that started it.

    Raises:
        KeyboardInterrupt: it was SIGINT. Otherwise as :func:`running_replicas`.
    """
    received: list[int] = []
    ready, stop, start = threading.Event(), threading.Event(), time.monotonic()

    def handle(sig: int, _frame: object) -> None:
        received.append(sig)
        stop.set()
        if len(received) > 1 or not ready.is_set():
            raise KeyboardInterrupt  # ends the draining, or the start

    def handle_signals() -> None:
        for sig in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sig, handle)  # in place of Ray's own, which ends the process with SIGABRT

    try:
        with running_replicas(spec, settings, host, port, on_joined=handle_signals):
            ready.set()
            on_ready(time.monotonic() - start)
            stop.wait()
            LOG.info("closing: requests that run have %g s", settings.drain_seconds)
    except KeyboardInterrupt:
        if not received:
            raise
    if received[0] == signal.SIGINT:
        raise KeyboardInterrupt


@contextmanager
def running_replicas(
    spec: ReplicaSpec,
    settings: RaySettings,
    host: str,
    port: int,
    on_joined: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Starts or joins a cluster, and serves from when every replica is warm until the context is left.

    ``on_joined`` is called once Ray is there, before the replicas: they answer before this process knows it.

    Raises:
        MissingEnvironmentError: Ray is missing, or a replica cannot start.
        InputError: Ray's token mode is off, or the cluster's token is missing.
    """
    check_ray(settings.address)
    require_token(own_cluster=settings.address is None)
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions

    try:
        try:
            _join_cluster(settings)
            on_joined()
            http = HTTPOptions(host=host, port=port)
            serve.start(proxy_location="HeadOnly", http_options=http, logging_config=_QUIET)
            serve.run(_deployment(settings, spec).bind(spec), name=spec.name, route_prefix="/")
        except (RuntimeError, ConnectionError) as error:
            words = " ".join(str(error).split())[-500:]
            raise MissingEnvironmentError(f"the replicas cannot start: {words}") from error
        try:
            yield
        finally:
            _drain(spec.name, settings.drain_seconds)
    finally:
        if ray.is_initialized():
            serve.shutdown()
            ray.shutdown()


def check_ray(address: str | None) -> None:
    """Checks that Ray is here, and that something listens at a cluster's address: Ray itself tries for many minutes.

    Raises:
        MissingEnvironmentError: Ray is missing or too old, or nobody listens there.
        InputError: the address is none.
    """
    try:
        installed = version("ray")
    except PackageNotFoundError as error:
        raise MissingEnvironmentError("serve --ray needs Ray: pip install 's2p-deploy[ray]'") from error
    if tuple(int(part) for part in installed.split(".")[:2]) < _OLDEST_RAY:
        oldest = ".".join(map(str, _OLDEST_RAY))
        raise MissingEnvironmentError(f"Ray {installed} is too old: install {oldest} or later")
    if address is None:
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > _MOST_PORT:
        raise InputError(f"--ray-address {address!r} must be HOST:PORT, as `ray start --head` prints it")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise MissingEnvironmentError(f"no Ray cluster at {address} ({error}): start one, or correct it") from error


def require_token(*, own_cluster: bool) -> None:
    """Switches Ray's token mode on for this process and what it starts. Before Ray is imported.

    A cluster of this process's own gets a token of its own where there is none; joining another needs its token.

    Raises:
        InputError: the mode was switched off, or there is no token for the cluster to join.
    """
    mode = os.environ.setdefault(MODE, "token")
    if mode.lower() != "token":
        raise InputError(f"{MODE}={mode}: whoever reached the cluster could run code on it; set {MODE}=token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    given = os.environ.get(TOKEN) or os.environ.get(TOKEN_FILE) or (Path.home() / ".ray" / "auth_token").is_file()
    if given:
        return
    if not own_cluster:
        raise InputError(f"the Ray cluster wants its token: put it into {TOKEN}, or its file's path into {TOKEN_FILE}")
    os.environ[TOKEN] = secrets.token_hex(32)


def _drain(name: str, seconds: float) -> None:
    """Takes the application away from the proxy and waits until its replicas have finished and ended."""
    from ray import serve

    end = time.monotonic() + seconds + _END_SECONDS
    with suppress(KeyboardInterrupt):  # of a second signal: then nothing is waited for
        while time.monotonic() < end:
            with suppress(TimeoutError):  # of Ray's own, which is a minute
                serve.delete(name)
                return


def _join_cluster(settings: RaySettings) -> None:
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    if settings.address is not None:
        ray.init(address=settings.address, **quiet)
        return
    # one core more for Ray Serve's own actors, which count none but wait for a machine that has some
    ray.init(
        _node_ip_address=_LOOPBACK,
        _system_config=_SYSTEM,
        num_cpus=max(2, round(settings.replicas * settings.cpus) + 1),
        object_store_memory=_STORE_BYTES,
        include_dashboard=False,
        **quiet,
    )


def _deployment(settings: RaySettings, spec: ReplicaSpec) -> Any:  # noqa: ANN401 - of Ray, which is not typed
    from ray import serve

    service = spec.settings
    return serve.deployment(
        serve.ingress()(Replica),
        name=spec.name,
        num_replicas=settings.replicas,
        ray_actor_options={"num_gpus": 1} if spec.on_gpu else {"num_cpus": settings.cpus},
        # more than the service takes: a full one answers 429 itself, and says when to come back
        max_ongoing_requests=(service.max_active or 32) + service.max_waiting + _SPARE_REQUESTS,
        logging_config=_QUIET,
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        graceful_shutdown_wait_loop_s=0.2,
    )
