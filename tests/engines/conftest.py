"""Graphs and engines that several tests read: built once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from s2p_deploy.engines import build_engine
from s2p_deploy.records import Engine, ExportedGraph
from tests.engines.small_graph import build_options, small_graph

GraphOf = Callable[[str, str], ExportedGraph]
EngineOf = Callable[[str, str, str], Engine]


@pytest.fixture(scope="session")
def graph_of(tmp_path_factory: pytest.TempPathFactory) -> GraphOf:
    """(dtype, weights) -> the small graph."""
    folder = tmp_path_factory.mktemp("graphs")

    @cache
    def made(dtype: str, weights: str) -> ExportedGraph:
        return small_graph(folder / f"{dtype}-{weights}", dtype, weights)

    return made


@pytest.fixture(scope="session")
def engine_of(graph_of: GraphOf, tmp_path_factory: pytest.TempPathFactory) -> EngineOf:
    """(backend, precision or optimization, weights) -> an engine of the fp32 graph. Not to be changed."""
    folder = tmp_path_factory.mktemp("engines")

    @cache
    def built(backend: str, mode: str, weights: str) -> Engine:
        out = folder / f"{backend}-{mode}-{weights}"
        return build_engine(graph_of("fp32", weights), out, backend=backend, options=build_options(mode))

    return built
