from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from diffusers import StableDiffusionPipeline

from s2p_deploy.calib import calibrate
from s2p_deploy.engines import TorchRunner, build_engine
from s2p_deploy.export import export_graph
from s2p_deploy.families import BasePipeline, load_pipeline
from s2p_deploy.families.time_path import load_time_path
from s2p_deploy.pipeline import EngineUNet
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import Engine
from tests.small_pipelines import TABLE, shared_small_base, tiny_base

if TYPE_CHECKING:
    from pathlib import Path

    from tests.shared_folder import SharedFolder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    return load_pipeline(tiny_base(tmp_path_factory.mktemp("tiny") / "pipeline"))


@pytest.fixture(scope="module")
def denoiser(base: StableDiffusionPipeline) -> EngineUNet:
    """The FP UNet behind the runner's interface: what the pipeline draws must not change by a bit."""
    runner = TorchRunner(lambda *inputs: base.unet(*inputs, return_dict=False)[0])
    return EngineUNet(runner, base.unet.config, TABLE)


@pytest.fixture(scope="module")
def origin(shared: SharedFolder) -> BasePipeline:
    return shared_small_base(shared)


@pytest.fixture(scope="module")
def engine(origin: BasePipeline, shared: SharedFolder) -> Engine:
    """Of the input form: it runs schedules with timesteps between the training timesteps. Not to be changed."""

    def make(folder: Path) -> None:
        model = calibrate(origin, Recipe.load("fp"), None, folder / "calib")
        graph = export_graph(model, folder / "graph", time_table="input", time_path=load_time_path(origin))
        build_engine(graph, folder / "engine", backend="onnxruntime")

    return Engine.open(shared.made("small-engine", make) / "engine")
