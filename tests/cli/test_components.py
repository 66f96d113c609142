"""``components`` and ``generate --components``."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from s2p_deploy.calib import calibrate
from s2p_deploy.engines import build_engine
from s2p_deploy.errors import InputError
from s2p_deploy.export import export_graph
from s2p_deploy.families import BasePipeline
from s2p_deploy.pipeline import EngineAutoencoder, load_engine_pipeline, open_pipeline, save_engine_pipeline
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import Base, ComponentEngines, Engine, ShapeProfile, Span, write_artifact
from tests.cli.commands import Run
from tests.shared_folder import SharedFolder
from tests.small_pipelines import FACTOR, shared_small_base, shared_small_components


@pytest.fixture(scope="module")
def base(shared: SharedFolder) -> BasePipeline:
    return shared_small_base(shared)


@pytest.fixture(scope="module")
def parts(shared: SharedFolder) -> Path:
    return shared_small_components(shared, "onnxruntime").folder


@pytest.fixture(scope="module")
def engine(base: BasePipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    graph = export_graph(calibrate(base, Recipe.load("fp"), None, folder / "calib"), folder / "graph")
    return build_engine(graph, folder / "engine", backend="onnxruntime").folder


def test_parts_are_an_artifact_like_others(run: Run, parts: Path, base: BasePipeline) -> None:
    shown = run("inspect", parts, "--json").data
    assert shown["kind"] == "ComponentEngines"
    assert shown["base"]["digest"] == base.base.digest
    assert run("verify", parts).code == 0
    again = run("components", base.folder, "--backend", "onnxruntime", "--out", parts)
    assert again.code == 2
    assert "exists" in again.err


def test_a_picture_is_drawn_with_them(run: Run, parts: Path, engine: Path, tmp_path: Path) -> None:
    draw = ("generate", engine, "--prompt", "a small red circle", "--steps", 3, "--seed", 1)
    plain, other = tmp_path / "plain.png", tmp_path / "parts.png"
    assert run(*draw, "--out", plain).code == 0
    assert run(*draw, "--components", parts, "--out", other).code == 0
    pictures = [np.asarray(Image.open(file)).astype(int) for file in (plain, other)]
    assert pictures[0].shape == (8 * FACTOR, 8 * FACTOR, 3)
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_a_pipeline_kept_with_its_parts_draws_the_same(engine: Path, parts: Path, tmp_path: Path) -> None:
    opened = open_pipeline(Engine.open(engine), components=ComponentEngines.open(parts))
    save_engine_pipeline(opened.pipe, tmp_path / "kept")
    pictures = []
    for one in (opened, load_engine_pipeline(tmp_path / "kept")):
        assert type(one.pipe.vae) is EngineAutoencoder
        asked = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "np"}
        pictures.append(one.pipe("a small red circle", generator=torch.Generator().manual_seed(1), **asked).images)
        one.close()
    np.testing.assert_array_equal(*pictures)
    assert {path.name for path in (tmp_path / "kept").iterdir() if path.is_dir()} >= {
        "engine",
        "components",
        "tokenizer",
    }
    assert not (tmp_path / "kept" / "vae").exists()


def test_parts_for_other_sizes_than_the_engines_are_refused_before_anything_is_drawn(engine: Path, parts: Path) -> None:
    """An engine of one size has no profile of heights: its network's own size counts."""
    tall = ShapeProfile(1, 1, 4, height=Span(16, 16, 16), width=Span(8, 8, 8))
    components = dataclasses.replace(ComponentEngines.open(parts), profile=tall)
    with pytest.raises(InputError, match=f"{parts}: .* latents of height 16 and width 8, got 8x8"):
        open_pipeline(Engine.open(engine), components=components)
    fitting = dataclasses.replace(components, profile=dataclasses.replace(tall, height=Span(8, 8, 16)))
    open_pipeline(Engine.open(engine), components=fitting).close()


def test_parts_of_another_pipeline_are_refused(run: Run, engine: Path, tmp_path: Path, parts: Path) -> None:
    made = ComponentEngines.open(parts)

    def fill(folder: Path) -> dict[str, Any]:
        for name in made.manifest.files:
            shutil.copyfile(parts / name, folder / name)
        return made.manifest.content

    write_artifact(tmp_path / "p", kind="ComponentEngines", base=Base("another", "0" * 64), recipe={}, fill=fill)
    draw = ("generate", engine, "--prompt", "x", "--steps", 1, "--out", tmp_path / "x.png")
    refused = run(*draw, "--components", tmp_path / "p")
    assert refused.code == 5
    assert "are of two pipelines" in refused.err
    spoiled = tmp_path / "spoiled"
    shutil.copytree(parts, spoiled)
    (spoiled / "vae_decoder.onnx").write_bytes(b"")
    assert run(*draw, "--components", spoiled).code == 5
    assert run(*draw, "--components", engine).code == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--backend", "magic"), "unknown backend 'magic'"),
        (("--backend", "onnxruntime", "--batch", "1:1:4"), "takes batches and pictures of any size: leave --batch"),
        (("--backend", "onnxruntime", "--height", "64"), "--height '64' must be MIN:OPT:MAX"),
        (("--backend", "onnxruntime", "--precision", "f16"), "export the graph in another type"),
    ],
)
def test_wrong_options_are_refused(
    run: Run, base: BasePipeline, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    refused = run("components", base.folder, *options, "--out", tmp_path / "p")
    assert refused.code == 2
    assert said in refused.err
    assert not list(tmp_path.iterdir())
