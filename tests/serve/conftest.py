"""A W8A8 engine of a pipeline whose UNet runs in a millisecond; ONNX Runtime's reference, so bits can be compared."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pytest

from s2p_deploy.calib import calibrate
from s2p_deploy.engines import build_engine
from s2p_deploy.export import export_graph
from s2p_deploy.families import resolve_base
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import Engine, Prompt, PromptSet
from tests.cli.commands import QUICK
from tests.small_pipelines import tiny_base

if TYPE_CHECKING:
    from pathlib import Path

    from s2p_deploy.families import BasePipeline
    from tests.shared_folder import SharedFolder

PROMPTS = PromptSet((Prompt("a", "a large red circle, white background"), Prompt("b", "a small blue square")))


_SCHEDULE = ("sampling.steps=20", "dataset.samples_per_prompt=10", "sampling.guidance_scale=2.0")


class Tiny(NamedTuple):
    """An engine and the pipeline it was made from."""

    engine: Engine
    base: BasePipeline


@pytest.fixture(scope="session")
def tiny(shared: SharedFolder) -> Tiny:
    from s2p_deploy.cli.options import overrides_from_settings

    def make(folder: Path) -> None:
        base = tiny_base(folder / "pipeline")
        recipe = Recipe.load("w8a8", overrides_from_settings([*QUICK, *_SCHEDULE]))
        model = calibrate(base, recipe, PROMPTS, folder / "calib")
        build_engine(export_graph(model, folder / "graph"), folder / "engine", backend="onnxruntime")

    folder = shared.made("served-engine", make)
    return Tiny(Engine.open(folder / "engine"), resolve_base(str(folder / "pipeline")))
