"""The tiny engine and its floating-point one, and a server of both that all tests share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import pytest

from s2p_deploy.calib import calibrate
from s2p_deploy.engines import build_engine
from s2p_deploy.export import export_graph
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import Engine
from s2p_deploy.serve.http.metrics import Metrics
from s2p_deploy.serve.service import ImageService, ServiceSettings, open_service
from tests.serve.http.live_server import LiveServer, live_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.serve.conftest import Tiny
    from tests.shared_folder import SharedFolder

SETTINGS = ServiceSettings(batches=(1, 2, 4))
NAMES = ("small", "fp")


class Opening(Protocol):
    """Opens a model by its name, ``small`` or ``fp``."""

    def __call__(self, name: str, metrics: Metrics, settings: ServiceSettings = ...) -> Callable[[], ImageService]: ...


@pytest.fixture(scope="session")
def floating(tiny: Tiny, shared: SharedFolder) -> Engine:
    def make(folder: Path) -> None:
        recipe = Recipe.load("fp", {"sampling": {"steps": 20, "guidance_scale": 2.0}})
        model = calibrate(tiny.base, recipe, None, folder / "calib")
        build_engine(export_graph(model, folder / "graph"), folder / "engine", backend="onnxruntime")

    return Engine.open(shared.made("served-floating-engine", make) / "engine")


@pytest.fixture(scope="session")
def opening(tiny: Tiny, floating: Engine) -> Opening:
    engines = {"small": tiny.engine, "fp": floating}

    def of(name: str, metrics: Metrics, settings: ServiceSettings = SETTINGS) -> Callable[[], ImageService]:
        def open_it() -> ImageService:
            service = open_service(engines[name], tiny.base, settings, metrics.observer(name), name)
            metrics.watch(name, service)
            return service

        return open_it

    return of


@pytest.fixture(scope="session")
def server(opening: Opening) -> Iterator[LiveServer]:
    """``small`` and ``fp``, ready."""
    metrics = Metrics()
    with live_server({name: opening(name, metrics) for name in NAMES}, metrics=metrics) as live:
        yield live
