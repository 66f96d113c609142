"""The example that makes the last calls in floating point."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from s2p_deploy.calib import calibrate
from s2p_deploy.cli.options import overrides_from_settings
from s2p_deploy.engines import build_engine
from s2p_deploy.export import export_graph
from s2p_deploy.families import denoiser_of, load_pipeline
from s2p_deploy.pipeline import open_pipeline
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import Engine, Prompt, PromptSet
from tests.cli.commands import QUICK

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from s2p_deploy.engines import Runner
    from s2p_deploy.families import BasePipeline
    from tests.shared_folder import SharedFolder

EXAMPLE = Path(__file__).parents[2] / "examples" / "last_steps.py"
PROMPT = "a large red circle, white background"


@pytest.fixture(scope="module")
def quantized(origin: BasePipeline, shared: SharedFolder) -> Engine:
    def make(folder: Path) -> None:
        recipe = Recipe.load("w8a8", overrides_from_settings([*QUICK, "sampling.steps=8"]))
        prompts = PromptSet((Prompt("a", PROMPT), Prompt("b", "a small blue square")))
        model = calibrate(origin, recipe, prompts, folder / "calib")
        build_engine(export_graph(model, folder / "graph"), folder / "engine", backend="onnxruntime")

    return Engine.open(shared.made("quantized-small-engine", make) / "engine")


class Counting:
    def __init__(self, runner: Runner) -> None:
        self.runner, self.calls = runner, 0

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        self.calls += 1
        return self.runner.infer(inputs)

    def close(self) -> None:
        self.runner.close()


def test_all_calls_but_the_first_are_floating_points(
    origin: BasePipeline, quantized: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come closer to the floating-point pipeline's picture, and the pipeline stays as it was."""
    stock = load_pipeline(origin)
    given = {"prompt": PROMPT, "num_inference_steps": 8, "guidance_scale": 2.0, "output_type": "pil"}

    def seed() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    expected = np.asarray(stock(**given, generator=seed()).images[0], np.float64)
    draw = runpy.run_path(str(EXAMPLE))["draw"]
    distances = []
    with open_pipeline(quantized, origin) as opened:
        denoiser = denoiser_of(opened.pipe)
        denoiser.runner = runner = Counting(denoiser.runner)
        for calls in (0, 4, 8):
            runner.calls = 0
            picture = draw(opened.pipe, stock.unet, calls, **given, generator=seed())
            distances.append(np.square(np.asarray(picture, np.float64) - expected).mean())
            assert denoiser_of(opened.pipe) is denoiser
            assert runner.calls == 9 - calls, "PNDM makes one more call than steps"
        alone = opened.pipe(**given, generator=seed()).images[0]
    assert distances[0] == np.square(np.asarray(alone, np.float64) - expected).mean()
    assert distances[0] > distances[2]
    out = tmp_path / "picture.png"
    asked = [str(quantized.folder), str(origin.folder), PROMPT, str(out), "--steps", "8", "--calls", "2"]
    monkeypatch.setattr(sys, "argv", ["last_steps.py", *asked])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert Image.open(out).size == expected.shape[:2]
