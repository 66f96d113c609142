"""Starts or joins a Ray cluster, and puts the replicas of an engine on it."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2p_deploy.errors import InputError, MissingEnvironmentError
from s2p_deploy.serve.ray.access import check_ray, require_token

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from s2p_deploy.families import BasePipeline
    from s2p_deploy.records import Engine
    from s2p_deploy.serve.facts import ServiceFacts
    from s2p_deploy.serve.observer import Observer
    from s2p_deploy.serve.ray.replica import ReplicaSpec
    from s2p_deploy.serve.ray.service import RayService
    from s2p_deploy.serve.service import ServiceSettings

_STORE_BYTES = 100 * 2**20  # pictures pass through it, nothing else
_READY_SECONDS = 900.0
# On Linux Ray puts the address that other machines reach this one by in the place of 127.0.0.1.
_LOOPBACK = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
_SYSTEM = {
    "worker_niceness": 0,  # replicas are what the machine is for; Ray's own choice is 15
    "agent_register_timeout_ms": 120_000,  # a busy machine imports for long
    "worker_register_timeout_seconds": 300,
}
_MOST_REPLICAS, _ACTIVE = 256, 16


@dataclass(frozen=True)
class RaySettings:
    """``replicas`` of an engine, each on a GPU of its own or on ``cpus`` cores.

    ``address`` is that of a cluster to join (None: one of this process's own, on this machine, for loopback alone).
    """

    replicas: int = 1
    address: str | None = None
    cpus: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.replicas <= _MOST_REPLICAS:
            raise InputError(f"{self.replicas} replicas: give 1 to {_MOST_REPLICAS}")
        if self.cpus <= 0:
            raise InputError(f"{self.cpus} cores for a replica: give more than 0")


def open_ray_service(
    engine: Engine,
    base: BasePipeline,
    settings: ServiceSettings,
    observer: Observer,
    name: str,
    ray_settings: RaySettings,
) -> RayService:
    """Replicas of an engine as one service: what ``open_service`` gives, on several devices. Takes a minute.

    Raises:
        MissingEnvironmentError: Ray is missing, or a replica cannot start.
        InputError: Ray's token mode is off, or the cluster's token is missing.
    """
    check_ray()
    require_token(own_cluster=ray_settings.address is None)
    from s2p_deploy.serve.ray.replica import ReplicaSpec

    active = settings.max_active or _ACTIVE
    spec = ReplicaSpec(
        engine=str(engine.folder.resolve()),
        digest=engine.manifest.digest,
        base=str(base.folder.resolve()) if Path(base.base.source).is_dir() else base.base.source,
        name=name,
        # what Ray hands over must find room there
        settings=replace(settings, max_active=active, max_waiting=active),
    )
    on_gpu = engine.environment.get("device") == "CUDA GPU"
    room = ray_settings.replicas * active + settings.max_waiting
    # Linux ends what Ray starts together with the thread that started it: this one lives as long as the replicas
    keeper = ThreadPoolExecutor(1, thread_name_prefix="ray cluster")

    def stop() -> None:
        keeper.submit(_shut_down).result()
        keeper.shutdown()

    try:
        keeper.submit(_start, ray_settings).result()
        handle, facts = keeper.submit(_deployed, spec, ray_settings, room, on_gpu=on_gpu).result()
    except Exception as error:
        stop()
        if isinstance(error, (RuntimeError, ConnectionError)):
            words = " ".join(str(error).split())[-500:]
            raise MissingEnvironmentError(f"the replicas cannot start: {words}") from error
        raise
    from s2p_deploy.serve.ray.service import RayService

    return RayService(handle, facts, room, observer, stop)


def _start(ray_settings: RaySettings) -> None:
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    if ray_settings.address is not None:
        ray.init(address=ray_settings.address, **quiet)
        return
    # one core more for Ray Serve's own actors, which count none but wait for a machine that has some
    ray.init(
        _node_ip_address=_LOOPBACK,
        _system_config=_SYSTEM,
        num_cpus=max(2, round(ray_settings.replicas * ray_settings.cpus) + 1),
        object_store_memory=_STORE_BYTES,
        include_dashboard=False,
        **quiet,
    )


def _deployed(
    spec: ReplicaSpec, ray_settings: RaySettings, room: int, *, on_gpu: bool
) -> tuple[DeploymentHandle, ServiceFacts]:
    """The way to the replicas, once all of them are warm, and what they say about themselves."""
    from ray import serve

    from s2p_deploy.serve.ray.replica import EngineReplica

    active = spec.settings.max_active or _ACTIVE
    # HTTP is this package's own server
    serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
    deployment = serve.deployment(
        EngineReplica,
        name=spec.name,
        num_replicas=ray_settings.replicas,
        ray_actor_options={"num_gpus": 1} if on_gpu else {"num_cpus": ray_settings.cpus},
        max_ongoing_requests=active,
        max_queued_requests=room,
        logging_config={"log_level": "WARNING"},
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=5,  # the front has drained before
        graceful_shutdown_wait_loop_s=0.2,
    )
    handle = serve.run(deployment.bind(spec), name=spec.name, route_prefix=None)
    return handle, handle.facts.remote().result(timeout_s=_READY_SECONDS)


def _shut_down() -> None:
    """Ends replicas and, where it is this process's own, the cluster."""
    import ray
    from ray import serve

    if ray.is_initialized():
        serve.shutdown()
        ray.shutdown()
