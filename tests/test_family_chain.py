"""Every other family goes the whole way: calibrate, export, build, validate, on a small trained pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from s2p_deploy.api import as_prompts
from s2p_deploy.calib import calibrate
from s2p_deploy.engines import build_engine, load_engine
from s2p_deploy.export import export_graph
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import ExportedGraph, LatentDataset
from s2p_deploy.validation import validate
from s2p_deploy.validation.reference import choose_latents
from tests.small_pipelines import PIPELINES, sibling

if TYPE_CHECKING:
    from pathlib import Path

    from s2p_deploy.engines import BoundRunner

STEPS = {"sd2": 20, "sdxl": 20, "sd3": 14, "sd35": 14, "inpaint": 20, "lcm": 4, "refiner": 20}
# Flow models diverge in content: reported, not bounded. 20 steps of PNDM amplify errors: so few samples give the
# bundled pipeline, which inpainting was fine-tuned from, 38 dB.
MEDIAN_PSNR = dict.fromkeys(STEPS, 40.0) | {"sd3": None, "sd35": None, "inpaint": 36.0}
PICTURES = {"refiner": {"pictures": str(PIPELINES / "shapes-sdxl")}}
MIXED_DB = 100.0  # each sample of a batch on several rows, against its lone run; ONNX Runtime, optimization off


def exported(name: str, folder: Path, *, prompts: int, pictures: int) -> ExportedGraph:
    """A W8A8 model of a sibling as a graph, with its calibration beside it."""
    overrides = {
        "sampling": {"steps": STEPS[name], "max_sequence_length": 8} | PICTURES.get(name, {}),
        "dataset": {"prompts": prompts},
        "scales": {"latents": 32},
        "validation": {"pictures": pictures, "latents": 64, "gates": {"median_psnr": MEDIAN_PSNR[name]}},
    }
    model = calibrate(sibling(name), Recipe.load("w8a8", overrides), as_prompts("shapes:train"), folder / "calib")
    return export_graph(model, folder / "graph")


def sqnr(expected: np.ndarray, found: np.ndarray) -> float:
    return float(10 * np.log10(np.square(expected).sum() / np.square(found - expected).sum().clip(1e-30)))


def lone_runs(runner: BoundRunner, inputs: dict[str, np.ndarray]) -> np.ndarray:
    size = len(inputs["timestep_index"])
    parts = [{key: value[index : index + 1] for key, value in inputs.items()} for index in range(size)]
    return np.concatenate([runner.infer(part)["noise_pred"] for part in parts])


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.slow
def test_samples_of_one_batch_may_be_on_different_rows(name: str, tmp_path: Path) -> None:
    graph = exported(name, tmp_path, prompts=8, pictures=8)
    engine = build_engine(graph, tmp_path / "engine", backend="onnxruntime")
    latents = choose_latents(LatentDataset.open(tmp_path / "calib" / "dataset"), 8)
    order = np.argsort(latents.timestep_indices)[::2]
    inputs = {key: value[order] for key, value in latents.inputs().items()}
    assert len(set(inputs["timestep_index"].tolist())) > 2
    with load_engine(engine) as runner:
        together, lone = runner.infer(inputs)["noise_pred"], lone_runs(runner, inputs)
    assert sqnr(lone, together) >= MIXED_DB


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_a_sibling_goes_the_whole_way(name: str, tmp_path: Path) -> None:
    """The gates of the recipe, parity's among them, are DESIGN's: codes, blocks, change of SQNR, pictures."""
    graph = exported(name, tmp_path, prompts=64, pictures=32)
    engine = build_engine(graph, tmp_path / "engine", backend="openvino")
    report = validate(engine, as_prompts("shapes:held_out").first(32), tmp_path / "report")
    assert report.verdict == "passed", report.gates
