from __future__ import annotations

import pytest
from diffusers import StableDiffusionPipeline

from s2p_deploy.engines import TorchRunner
from s2p_deploy.families import load_pipeline
from s2p_deploy.pipeline import EngineUNet
from tests.small_pipelines import TABLE, tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    return load_pipeline(tiny_base(tmp_path_factory.mktemp("tiny") / "pipeline"))


@pytest.fixture(scope="module")
def denoiser(base: StableDiffusionPipeline) -> EngineUNet:
    """The FP UNet behind the runner's interface: what the pipeline draws must not change by a bit."""
    runner = TorchRunner(lambda *inputs: base.unet(*inputs, return_dict=False)[0])
    return EngineUNet(runner, base.unet.config, TABLE)
