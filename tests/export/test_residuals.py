"""Graphs that take a ControlNet's residuals: zeros change no bit, others do what diffusers does with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from artifacts import tiny_calibrated, tiny_inputs, tiny_unet

from s2p_deploy.calib import calibrate, fake_quant_denoiser
from s2p_deploy.engines import BuildOptions, ShapeProfile, Span, build_engine, load_engine
from s2p_deploy.engines.options import shape_at
from s2p_deploy.errors import InputError
from s2p_deploy.export import export_graph
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import TensorSpec
from s2p_deploy.records.optional_inputs import is_residual
from tests.small_pipelines import sibling

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Run

    from s2p_deploy.records import CalibratedModel, ExportedGraph

RESIDUALS = {
    "down_residual_0": ("batch", 32, "height", "width"),
    "down_residual_1": ("batch", 32, "height", "width"),
    "down_residual_2": ("batch", 32, "height/2", "width/2"),
    "down_residual_3": ("batch", 64, "height/2", "width/2"),
    "mid_residual": ("batch", 64, "height/2", "width/2"),
}
SIZES = {"batch": 2, "height": 8, "width": 8}


@pytest.fixture(scope="module")
def graph(w8a8: CalibratedModel) -> ExportedGraph:
    return export_graph(w8a8, w8a8.folder.parent / "residuals", controlnet=True)


@pytest.fixture(scope="module")
def opened(w8a8: CalibratedModel) -> ExportedGraph:
    return export_graph(w8a8, w8a8.folder.parent / "open-residuals", controlnet=True, sizes="dynamic")


def residual_specs(graph: ExportedGraph) -> list[TensorSpec]:
    return [spec for spec in graph.inputs if is_residual(spec.name)]


def random_residuals(graph: ExportedGraph, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    return {
        spec.name: random.standard_normal(shape_at(spec, sizes)).astype(spec.dtype) for spec in residual_specs(graph)
    }


def test_they_are_the_last_inputs(graph: ExportedGraph) -> None:
    assert [spec.name for spec in graph.inputs][-6:] == ["act_scales", *RESIDUALS]
    fixed = {name: shape_at(TensorSpec(name, "", shape), SIZES) for name, shape in RESIDUALS.items()}
    assert {spec.name: shape_at(spec, {"batch": 2}) for spec in residual_specs(graph)} == fixed


@pytest.mark.slow
def test_their_sizes_follow_the_latents(opened: ExportedGraph) -> None:
    assert {spec.name: spec.shape for spec in residual_specs(opened)} == RESIDUALS


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_an_engine_without_residuals_gives_the_bits_of_one_that_takes_none(
    graph: ExportedGraph, w8a8_graph: ExportedGraph, tmp_path: Path, backend: str
) -> None:
    given = tiny_inputs(3)
    found = []
    for name, one in (("without", w8a8_graph), ("with", graph)):
        with load_engine(build_engine(one, tmp_path / name, backend=backend)) as runner:
            found.append(runner.infer(given)["noise_pred"])
            if name == "with":
                for spec in runner.optional:
                    given[spec.name] = np.ones(shape_at(spec, SIZES | {"batch": 3}))
                    changed = runner.infer(given)["noise_pred"]
                    assert not np.array_equal(changed, found[-1])  # every one of them is added somewhere
                    del given[spec.name]
                with pytest.raises(InputError, match=r"mid_residual has shape \[3, 1\]"):
                    runner.infer(given | {"mid_residual": np.ones((3, 1))})
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize(
    ("sizes", "height", "width"), [("fixed", 8, 8), pytest.param("dynamic", 4, 12, marks=pytest.mark.slow)]
)
def test_in_floating_point_they_are_added_as_diffusers_adds_them(
    tmp_path: Path, run_onnx: Run, sizes: str, height: int, width: int
) -> None:
    calibrated = tiny_calibrated(tmp_path / "calib", "none", "none", recipe="fp")
    graph = export_graph(calibrated, tmp_path / "graph", controlnet=True, sizes=sizes)
    residuals = random_residuals(graph, {"batch": 2, "height": height, "width": width})
    sample = np.random.default_rng(0).standard_normal((2, 4, height, width)).astype(np.float32)
    inputs = tiny_inputs() | {"sample": sample}
    *down, mid = map(torch.from_numpy, residuals.values())
    with torch.no_grad():
        expected = tiny_unet()(
            *(torch.from_numpy(inputs[name]) for name in ("sample", "timestep_index", "encoder_hidden_states")),
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
        ).sample
    found = run_onnx(graph.onnx_file, inputs | residuals)["noise_pred"]
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.slow
def test_half_precision_graphs_take_them_in_half(w8a8: CalibratedModel, tmp_path: Path) -> None:
    graph = export_graph(w8a8, tmp_path / "half", dtype="fp16", controlnet=True)
    assert {spec.dtype for spec in residual_specs(graph)} == {"float16"}


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.slow
def test_engines_of_several_sizes_take_residuals_that_follow(
    opened: ExportedGraph, tmp_path: Path, backend: str
) -> None:
    options = BuildOptions(profile=ShapeProfile(1, 2, 4, height=Span(8, 8, 16), width=Span(8, 8, 16)))
    with load_engine(build_engine(opened, tmp_path / "engine", backend=backend, options=options)) as runner:
        given = tiny_inputs() | {"sample": np.zeros((2, 4, 12, 16), np.float32)}
        residuals = random_residuals(opened, {"batch": 2, "height": 12, "width": 16})
        assert not np.array_equal(runner.infer(given)["noise_pred"], runner.infer(given | residuals)["noise_pred"])


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
@pytest.mark.slow
def test_the_other_kinds_take_them_too(name: str, tmp_path: Path, run_onnx: Run) -> None:
    """In floating point, against the network that diffusers computes."""
    calibrated = calibrate(sibling(name), Recipe.load("fp"), None, tmp_path / "calib")
    graph = export_graph(calibrated, tmp_path / "graph", sizes="dynamic", controlnet=True)
    denoiser, random = fake_quant_denoiser(calibrated).denoiser.inner.with_given_features(), np.random.default_rng(0)
    for height, width in ((8, 8), (12, 4)):
        sizes = {"batch": 2, "height": height, "width": width}
        given = {spec.name: random.standard_normal(shape_at(spec, sizes)).astype(spec.dtype) for spec in graph.inputs}
        residuals = {spec.name: torch.from_numpy(given[spec.name]) for spec in residual_specs(graph)}
        arguments = ("sample", "timestep_index", "encoder_hidden_states", "time_projections")
        with torch.no_grad():
            expected = denoiser(*(torch.from_numpy(given[argument]) for argument in arguments), residuals).numpy()
        found = run_onnx(graph.onnx_file, given)["noise_pred"]
        assert np.square(found - expected).sum() < 1e-9 * np.square(expected).sum()
