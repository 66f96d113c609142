"""One small chain for all: a tiny pipeline calibrated, exported and built for ONNX Runtime, as the commands do it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from s2p_deploy.calib import calibrate, fake_quant_denoiser
from s2p_deploy.calib.quantized_denoiser import FakeQuantDenoiser
from s2p_deploy.engines import build_engine
from s2p_deploy.export import export_graph
from s2p_deploy.recipe import recipe_from_data
from s2p_deploy.records import Engine, Prompt, PromptSet
from s2p_deploy.shapes.scenes import Scene, SceneObject, caption
from s2p_deploy.validation import Chain, open_chain
from s2p_deploy.validation.reference import ValidationLatents, choose_latents
from tests.small_pipelines import tiny_base

if TYPE_CHECKING:
    from pathlib import Path

    from tests.shared_folder import SharedFolder

RECIPE = {
    "name": "tiny",
    "weights": "int8",
    "activations": "int8",
    "rules": [
        {"match": "conv_in", "activations": "none"},
        {"match": "conv_out", "activations": "none"},
        {"match": "text", "activations": "none"},
    ],
    "sampling": {"steps": 5, "guidance_scale": 2.5},
    "dataset": {"prompts": 4, "samples_per_prompt": 3, "width": 4},
    "training": {"iterations": 0},
    "scales": {"latents": 8},
    # random weights draw nothing that could be read, so accuracy is noise
    "validation": {"pictures": 3, "latents": 16, "gates": {"median_psnr": 20.0, "attribute_accuracy_drop": 1.0}},
}


@pytest.fixture(scope="session")
def prompts() -> PromptSet:
    """Three captions of the grammar."""
    objects = [SceneObject("small", colour, "circle", "top left") for colour in ("red", "green", "blue")]
    return PromptSet(tuple(Prompt(f"p{i}", caption(Scene((item,), "white"))) for i, item in enumerate(objects)))


@pytest.fixture(scope="session")
def chain(shared: SharedFolder, prompts: PromptSet) -> Chain:
    def make(folder: Path) -> None:
        base = tiny_base(folder / "pipeline")
        words = PromptSet((*prompts.prompts, Prompt("word", "a word")))
        calibrated = calibrate(base, recipe_from_data(RECIPE, "test"), words, folder / "calib")
        build_engine(export_graph(calibrated, folder / "graph"), folder / "engine", backend="onnxruntime")

    return open_chain(Engine.open(shared.made("validated-chain", make) / "engine"))


@pytest.fixture(scope="session")
def latents(chain: Chain) -> ValidationLatents:
    assert chain.dataset is not None
    return choose_latents(chain.dataset, 16)


@pytest.fixture
def fake_quant(chain: Chain) -> FakeQuantDenoiser:
    return fake_quant_denoiser(chain.calibrated)
