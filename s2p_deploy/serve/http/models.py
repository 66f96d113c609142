"""The models of a server by name: loaded one after the other beside the server, then used, then drained."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal

from s2p_deploy.serve.http.problems import Problem, RequestProblem, unavailable
from s2p_deploy.serve.request import ClosingError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from s2p_deploy.serve.service import ImageService

State = Literal["loading", "ready", "closing"]


class ServedModels:
    """``openings`` load a model each, which may take minutes; the first name is the default model.

    ``on_ready`` is called in the loading thread with the seconds that all took.
    """

    def __init__(
        self, openings: Mapping[str, Callable[[], ImageService]], on_ready: Callable[[float], None] | None = None
    ) -> None:
        self._openings = dict(openings)
        self._on_ready = on_ready
        self._services: dict[str, ImageService] = {}
        self._closing = False
        self._loader = ThreadPoolExecutor(1, "load")
        self._loading: Future[None] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all models, loaded or not."""
        return tuple(self._openings)

    @property
    def state(self) -> State:
        """``ready`` once every model is loaded and warm, until the server drains."""
        if self._closing:
            return "closing"
        return "ready" if len(self._services) == len(self._openings) else "loading"

    @property
    def alive(self) -> bool:
        """Returns whether every model that was loaded still draws."""
        return all(service.alive for service in self._services.values())

    @property
    def failure(self) -> BaseException | None:
        """Returns the error that stopped a model from loading."""
        return self._loading.exception() if self._loading is not None and self._loading.done() else None

    def start(self) -> None:
        """Begins to load the models, in a thread of its own."""
        self._loading = self._loader.submit(self._load)

    def loaded(self, name: str) -> ImageService | None:
        """Returns a model that is warm, whatever the server does; None before, and where there is none of that name."""
        return self._services.get(name)

    def service(self, name: str | None) -> ImageService:
        """Returns a model by its name (None: the first).

        Raises:
            RequestProblem: there is none of that name, or it is not loaded yet. ClosingError: the server is ending.
        """
        wanted = self.names[0] if name is None else name
        if wanted not in self._openings:
            known = ", ".join(self.names)
            raise RequestProblem(Problem(404, f"there is no model {wanted!r}: use {known}", "model", "model_not_found"))
        if self._closing:
            raise ClosingError("the server is closing")
        service = self._services.get(wanted)
        if service is None:
            raise RequestProblem(unavailable(f"model {wanted!r} is still being loaded", "not_ready"))
        return service

    def drain(self, seconds: float) -> bool:
        """Accepts nothing new; returns whether everything was done within ``seconds``."""
        self._closing = True
        end = time.monotonic() + seconds
        done = [service.drain(max(0.0, end - time.monotonic())) for service in self._services.values()]
        return all(done)

    def close(self) -> None:
        """Stops every model, once a load that has begun is over."""
        self._closing = True
        self._loader.shutdown()
        for service in self._services.values():
            service.close()

    def _load(self) -> None:
        start = time.monotonic()
        for name, opening in self._openings.items():
            if self._closing:
                return
            self._services[name] = opening()
        if self._on_ready is not None and not self._closing:
            self._on_ready(time.monotonic() - start)
