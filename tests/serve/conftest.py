"""A W8A8 engine of a pipeline whose UNet runs in a millisecond; ONNX Runtime's reference, so bits can be compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from s2p_deploy.calib import calibrate
from s2p_deploy.engines import build_engine
from s2p_deploy.export import export_graph
from s2p_deploy.export.lora_targets import LoraRequest
from s2p_deploy.families import resolve_base
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import CalibratedModel, Engine, ExportedGraph, Prompt, PromptSet
from tests.cli.commands import QUICK
from tests.random_loras import in_peft, random_layers, write_lora
from tests.small_pipelines import tiny_base

if TYPE_CHECKING:
    from s2p_deploy.families import BasePipeline
    from tests.shared_folder import SharedFolder

PROMPTS = PromptSet((Prompt("a", "a large red circle, white background"), Prompt("b", "a small blue square")))


_SCHEDULE = ("sampling.steps=20", "dataset.samples_per_prompt=10", "sampling.guidance_scale=2.0")


class Tiny(NamedTuple):
    """An engine and the pipeline it was made from."""

    engine: Engine
    base: BasePipeline


# LoRAs for the engine of 8 ranks: their own rank, layers of the UNet and of the text encoder
BLOCK = "mid_block.attentions.0.transformer_blocks.0"
UP = "up_blocks.1.attentions.0.transformer_blocks.0"
TEXT = "encoder.layers.0.self_attn"
LORAS = {
    "ink": (3, [f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_v", f"{UP}.attn1.to_out.0"], [f"{TEXT}.q_proj"]),
    "wash": (4, [f"{UP}.attn1.to_v", f"{UP}.attn1.to_out.0", f"{UP}.attn2.to_k"], []),
    "wide": (6, [f"{BLOCK}.attn1.to_v", f"{UP}.attn1.to_v"], []),
    "words": (2, [], [f"{TEXT}.v_proj", f"{TEXT}.out_proj"]),
}


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


@pytest.fixture(scope="session")
def lora_files(tiny: Tiny, shared: SharedFolder) -> dict[str, Path]:
    def make(folder: Path) -> None:
        folder.mkdir()
        for seed, (name, (rank, unet, text)) in enumerate(LORAS.items()):
            layers = random_layers(tiny.base, {"unet": unet, "text_encoder": text}, rank=rank, seed=seed)
            write_lora(folder / f"{name}.safetensors", in_peft(layers))

    folder = shared.made("served-loras", make)
    return {name: folder / f"{name}.safetensors" for name in LORAS}


def branched(tiny: Tiny, shared: SharedFolder, backend: str) -> Engine:
    """The engine with low-rank branches beside the layers of attention."""

    def export(folder: Path) -> None:
        model = CalibratedModel.open(tiny.engine.folder.parent / "calib")
        export_graph(model, folder, lora=LoraRequest(8))

    def make(folder: Path) -> None:
        build_engine(ExportedGraph.open(graph), folder, backend=backend)

    graph = shared.made("served-branched-graph", export)
    return Engine.open(shared.made(f"served-branched-{backend}", make))


@pytest.fixture(scope="session")
def branched_tiny(tiny: Tiny, shared: SharedFolder) -> Tiny:
    """On ONNX Runtime."""
    return Tiny(branched(tiny, shared, "onnxruntime"), tiny.base)
