"""Pictures of several sizes from one engine, through stock pipelines and the command line."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from s2p_deploy.calib import calibrate
from s2p_deploy.cli import main
from s2p_deploy.engines import BuildOptions, ShapeProfile, Span, TorchRunner, build_engine, load_engine
from s2p_deploy.errors import InputError
from s2p_deploy.export import export_graph
from s2p_deploy.families import BasePipeline, load_pipeline
from s2p_deploy.pipeline import (
    EngineUNet,
    Schedule,
    generate,
    initial_noise,
    latent_size,
    picture_size,
    pipeline_with_engine,
)
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import Engine, ExportedGraph, Prompt, TimestepTable
from tests.small_pipelines import tiny_base

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

pytestmark = pytest.mark.slow  # a graph of open sizes takes a minute to trace

PROMPT = Prompt("id", "a small red circle at the top left, white background")
TABLE = TimestepTable("PNDMScheduler", {}, 50, (1, 501, 940), np.linspace(0.1, 1.5, 1000))
PROFILE = ShapeProfile(1, 2, 2, height=Span(6, 8, 12), width=Span(8, 12, 12))
SPANNED = "height 6 to 12 in steps of 2 and width 8 to 12 in steps of 2"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BasePipeline:
    return tiny_base(tmp_path_factory.mktemp("tiny") / "pipeline")


@pytest.fixture(scope="module")
def pipe(base: BasePipeline) -> StableDiffusionPipeline:
    return load_pipeline(base)


@pytest.fixture(scope="module")
def graph(base: BasePipeline, tmp_path_factory: pytest.TempPathFactory) -> ExportedGraph:
    """Nothing quantized: what differs from the pipeline's own pictures is the engine's."""
    folder = tmp_path_factory.mktemp("open")
    return export_graph(calibrate(base, Recipe.load("fp"), None, folder / "calib"), folder / "graph", sizes="dynamic")


@pytest.fixture(scope="module")
def engine(graph: ExportedGraph, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    options = BuildOptions(profile=PROFILE)
    return build_engine(graph, tmp_path_factory.mktemp("engine") / "engine", backend="onnxruntime", options=options)


def drawn(pipe: StableDiffusionPipeline, size: tuple[int, int]) -> np.ndarray:
    schedule = Schedule(3, "ddim", size=size)
    return np.asarray(generate(pipe, PROMPT, schedule=schedule, guidance_scale=2.5), np.int16)


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (64, 64)])
def test_a_picture_of_another_size_is_the_pipelines_own(
    pipe: StableDiffusionPipeline, engine: Engine, size: tuple[int, int]
) -> None:
    with load_engine(engine) as runner:
        found = drawn(pipeline_with_engine(pipe, engine, runner), size)
    assert found.shape == (*size, 3)
    assert np.abs(found - drawn(pipe, size)).max() <= 1


def test_openvino_draws_the_tuned_size_and_others(
    pipe: StableDiffusionPipeline, graph: ExportedGraph, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("openvino") / "engine"
    engine = build_engine(graph, out, backend="openvino", options=BuildOptions(profile=PROFILE))
    with load_engine(engine) as runner:
        assert runner.inputs[0].shape == ("batch", 4, 8, 12)
        for size in ((64, 96), (48, 80)):
            found = drawn(pipeline_with_engine(pipe, engine, runner), size)
            assert np.abs(found - drawn(pipe, size)).max() <= 1


def test_sizes_outside_the_profile_are_refused_with_what_it_spans(
    pipe: StableDiffusionPipeline, engine: Engine
) -> None:
    with load_engine(engine) as runner:
        with_engine = pipeline_with_engine(pipe, engine, runner)
        for size in ((128, 64), (64, 72), (40, 64)):
            with pytest.raises(InputError, match=f"takes latents of {SPANNED}, got {size[0] // 8}x{size[1] // 8}"):
                drawn(with_engine, size)


def test_an_engine_of_one_size_refuses_others(pipe: StableDiffusionPipeline) -> None:
    denoiser = EngineUNet(TorchRunner(lambda sample, *_: sample), pipe.unet.config, TABLE)
    with pytest.raises(InputError, match=r"takes latents of \(4, 8, 8\), got \(4, 8, 12\)"):
        denoiser(torch.zeros(1, 4, 8, 12), 1, torch.zeros(1, 24, 128))


def test_pixels_become_latents(pipe: StableDiffusionPipeline) -> None:
    assert picture_size(pipe, None, None) is None
    assert picture_size(pipe, 96, None) == (96, 64)
    assert latent_size(pipe, Schedule(3)) is None
    assert latent_size(pipe, Schedule(3, size=(96, 64))) == (12, 8)
    with pytest.raises(InputError, match="100x64 pixels: height and width must be multiples of 8"):
        latent_size(pipe, Schedule(3, size=(100, 64)))
    assert initial_noise([1, 2], pipe.unet.config, (12, 8)).shape == (2, 4, 12, 8)


def test_the_command_line_draws_what_the_engine_spans(
    base: BasePipeline, graph: ExportedGraph, tmp_path: object
) -> None:
    engine, picture = f"{tmp_path}/engine", f"{tmp_path}/picture.png"
    build = ["build", str(graph.folder), "--backend", "onnxruntime", "--out", engine]
    assert main([*build, "--height", "8:8:12", "--width", "8:12:12"]) == 0
    draw = ["generate", engine, "--prompt", PROMPT.text, "--out", picture, "--steps", "2", "--model", str(base.folder)]
    assert main([*draw, "--height", "64", "--width", "96"]) == 0
    assert Image.open(picture).size == (96, 64)
    assert main([*draw, "--height", "48"]) == 2
    assert main([*build, "--force", "--height", "8:9:12"]) == 2


def test_a_picture_of_another_size_is_drawn_on(
    base: BasePipeline, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the command line, and as the second pass of the example."""
    first, out = tmp_path / "first.png", tmp_path / "picture.png"
    Image.new("RGB", (96, 64), "red").save(first)
    draw = ["generate", str(engine.folder), "--prompt", PROMPT.text, "--steps", "4", "--model", str(base.folder)]
    assert main([*draw, "--image", str(first), "--strength", "0.5", "--out", str(out)]) == 0
    assert Image.open(out).size == (96, 64)
    asked = [str(engine.folder), PROMPT.text, str(out), "--scale", "1.5", "--steps", "4"]
    monkeypatch.setattr(sys, "argv", ["hires_fix.py", *asked])
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "hires_fix.py"), run_name="__main__")
    assert Image.open(out).size == (96, 96)
