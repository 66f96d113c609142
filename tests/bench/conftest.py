"""Small engines under recipes of choice, and one of a small pipeline that draws: built once."""

from __future__ import annotations

import pytest

from s2p_deploy.calib import calibrate
from s2p_deploy.engines import BuildOptions, build_engine
from s2p_deploy.export import export_graph
from s2p_deploy.families import BasePipeline
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import Engine, Prompt, PromptSet
from tests.named_engines import NamedEngines
from tests.small_pipelines import tiny_base


@pytest.fixture(scope="session")
def engine_of(tmp_path_factory: pytest.TempPathFactory) -> NamedEngines:
    """(recipe, optimization) -> a small engine that says it is of that recipe."""
    return NamedEngines(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="session")
def drawing_base(tmp_path_factory: pytest.TempPathFactory) -> BasePipeline:
    return tiny_base(tmp_path_factory.mktemp("drawing") / "base")


@pytest.fixture(scope="session")
def drawing_engine(drawing_base: BasePipeline, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """An engine of recipe fp, whose pipeline is there."""
    folder = tmp_path_factory.mktemp("drawing-engine")
    recipe = Recipe.load("fp", {"sampling": {"steps": 2}})
    calibrated = calibrate(drawing_base, recipe, PromptSet((Prompt("p", "a red circle"),)), folder / "calib")
    graph = export_graph(calibrated, folder / "graph")
    return build_engine(graph, folder / "engine", backend="onnxruntime", options=BuildOptions(optimization="full"))
