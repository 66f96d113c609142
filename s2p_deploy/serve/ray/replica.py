"""One replica: an engine, its step-batching service, and nothing of HTTP."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.errors import IntegrityError
from s2p_deploy.families import resolve_base
from s2p_deploy.records import Engine
from s2p_deploy.serve.observer import Unobserved
from s2p_deploy.serve.opening import open_service
from s2p_deploy.serve.service import ServiceSettings

if TYPE_CHECKING:
    from s2p_deploy.serve.facts import ServiceFacts
    from s2p_deploy.serve.request import ImageRequest

_LAST_SECONDS = 3.0  # for what is still drawn when a replica is told to stop; the front has drained before


@dataclass(frozen=True)
class ReplicaSpec:
    """What a replica opens: folders that every machine of the cluster sees, and what must be in them."""

    engine: str
    digest: str
    base: str
    name: str
    settings: ServiceSettings


class EngineReplica:
    """What Ray Serve runs, one per device.

    Raises:
        IntegrityError: the engine or the pipeline here is not the one that is served. Otherwise as ``open_service``.
    """

    def __init__(self, spec: ReplicaSpec) -> None:
        engine = Engine.open(Path(spec.engine))
        base = resolve_base(spec.base)
        if engine.manifest.digest != spec.digest or base.base.digest != engine.manifest.base.digest:
            raise IntegrityError(f"{spec.engine} or {spec.base} is another one on this machine (its digest differs)")
        self._service = open_service(engine, base, spec.settings, Unobserved(), spec.name)

    def facts(self) -> ServiceFacts:
        """What the service says about itself."""
        return self._service.facts

    async def draw(self, request: ImageRequest, seconds: float, request_id: str) -> np.ndarray[Any, Any]:
        """A picture uint8 [H, W, 3], which must be done within ``seconds``.

        Raises:
            InputError: it cannot be drawn. OverloadedError, LateError: as the service says.
        """
        ticket = self._service.submit(request, timeout=seconds, id=request_id)
        try:
            picture = await asyncio.wrap_future(ticket.picture)
        except asyncio.CancelledError:
            ticket.cancel()
            raise
        return np.asarray(picture)

    def check_health(self) -> None:
        """Raises RuntimeError where nothing is drawn any more: Ray then replaces the replica."""
        if not self._service.alive:
            raise RuntimeError("the drawing thread has ended")

    async def __del__(self) -> None:
        """Finishes what is drawn. Ray waits for this."""
        service = getattr(self, "_service", None)
        if service is not None:
            await asyncio.to_thread(service.drain, _LAST_SECONDS)
            await asyncio.to_thread(service.close)
