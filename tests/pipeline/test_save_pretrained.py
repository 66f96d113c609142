"""Pipelines with engines through diffusers' own ``save_pretrained`` and ``from_pretrained``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline, StableDiffusionPipeline

from s2p_deploy.errors import InputError, IntegrityError, MissingEnvironmentError, S2PError
from s2p_deploy.families import resolve_base
from s2p_deploy.pipeline import (
    EngineAutoencoder,
    EngineDenoiser,
    EngineTextEncoder,
    EngineUNet,
    load_engine_pipeline,
    open_pipeline,
    save_engine_pipeline,
)
from s2p_deploy.records import ComponentEngines, Engine, open_artifact, verify_chain
from tests.small_pipelines import shared_small_components

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.shared_folder import SharedFolder

PROMPT = "a small red circle at the top left, white background"


def drawn(pipe: DiffusionPipeline, **options: object) -> np.ndarray:
    asked = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "np"} | options
    pipe.set_progress_bar_config(disable=True)
    return np.asarray(pipe(PROMPT, generator=torch.Generator().manual_seed(5), **asked).images)


@pytest.fixture(scope="module")
def saved(engine: Engine, shared: SharedFolder) -> Path:
    """Not to be changed."""

    def make(folder: Path) -> None:
        with open_pipeline(engine) as opened:
            opened.pipe.save_pretrained(folder)

    return shared.made("saved-pipeline", make)


@pytest.fixture(scope="module")
def parts(shared: SharedFolder) -> ComponentEngines:
    return shared_small_components(shared, "onnxruntime")


def test_a_saved_pipeline_is_loaded_elsewhere_and_draws_the_same(engine: Engine, saved: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(saved, moved)
    assert Engine.open(moved / "unet").manifest == engine.manifest
    assert verify_chain(moved / "unet")[0].digest == engine.manifest.digest
    for kind in (DiffusionPipeline, StableDiffusionPipeline):
        pipe = kind.from_pretrained(moved)
        assert (type(pipe), type(pipe.unet)) == (StableDiffusionPipeline, EngineUNet)
        with open_pipeline(engine) as opened:
            np.testing.assert_array_equal(drawn(pipe), drawn(opened.pipe))
        pipe.unet.close()


@pytest.mark.slow
def test_the_class_is_found_once_the_package_was_imported(saved: Path) -> None:
    """In a process of its own, as a user has it."""
    load = (
        f"from diffusers import DiffusionPipeline; print(DiffusionPipeline.from_pretrained({str(saved)!r}).unet.dtype)"
    )
    for imports, code in (("import s2p_deploy.pipeline; ", 0), ("", 1)):
        ran = subprocess.run([sys.executable, "-c", imports + load], capture_output=True, text=True, check=False)
        assert ran.returncode == code, ran.stderr
        assert ("torch.float32" in ran.stdout) == (code == 0)
        assert code == 0 or "import s2p_deploy.pipeline" in ran.stderr  # diffusers' own advice


def test_a_pipeline_is_loaded_in_a_dtype_with_components_of_ones_own_and_for_other_tasks(saved: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(saved, dtype=torch.bfloat16)
    assert {pipe.unet.dtype, pipe.vae.dtype} == {torch.bfloat16}
    with EngineDenoiser.load(saved / "unet").runner:
        other = EngineUNet.from_pretrained(saved, subfolder="unet")
        given = DiffusionPipeline.from_pretrained(saved, unet=other)
        assert given.unet is other
        changed = AutoPipelineForImage2Image.from_pretrained(saved)
        assert isinstance(changed.unet, EngineUNet)
        picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
        assert drawn(changed, image=picture, strength=0.7).shape == (1, 16, 16, 3)


def test_it_may_be_saved_again_where_it_is_and_nowhere_else_that_is_taken(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    shutil.copytree(saved, folder)
    pipe = DiffusionPipeline.from_pretrained(folder)
    before = (folder / "unet" / "manifest.json").stat().st_mtime_ns
    pipe.save_pretrained(folder)
    assert (folder / "unet" / "manifest.json").stat().st_mtime_ns == before
    (tmp_path / "taken" / "unet").mkdir(parents=True)
    with pytest.raises(InputError, match="taken/unet exists: choose another folder"):
        pipe.save_pretrained(tmp_path / "taken")
    pipe.save_pretrained(tmp_path / "another")  # as the advice says
    pipe.unet.close()


def test_the_verified_form_is_saved_from_a_loaded_pipeline_too(saved: Path, tmp_path: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(saved)
    save_engine_pipeline(pipe, tmp_path / "verified")
    with load_engine_pipeline(tmp_path / "verified") as loaded:
        np.testing.assert_array_equal(drawn(loaded.pipe), drawn(pipe))
    with pytest.raises(InputError, match="exists: choose another folder, or pass replace=True"):
        save_engine_pipeline(pipe, tmp_path / "verified")
    save_engine_pipeline(pipe, tmp_path / "verified", replace=True)
    pipe.unet.close()


def remove_folder(folder: Path) -> None:
    shutil.rmtree(folder / "unet")


def remove_file(folder: Path) -> None:
    (folder / "unet" / "timesteps.json").unlink()


def remove_manifest(folder: Path) -> None:
    (folder / "unet" / "manifest.json").unlink()


def change_engine(folder: Path) -> None:
    file = next((folder / "unet").glob("*.data"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def change_scales(folder: Path) -> None:
    file = folder / "unet" / "act_scales.safetensors"
    file.write_bytes(file.read_bytes() + b" ")


def add_file(folder: Path) -> None:
    (folder / "unet" / "config.json").write_text("{}", encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (remove_folder, InputError, "lacks the folder of an engine that its model_index.json names: save it again"),
        (remove_file, IntegrityError, "timesteps.json"),
        (remove_manifest, InputError, "is no artifact of s2p-deploy: it has no manifest.json"),
        (change_engine, IntegrityError, "was changed after it was written"),
        (change_scales, IntegrityError, "was changed after it was written"),
        (add_file, IntegrityError, "is not in the manifest: remove it"),
    ],
)
def test_what_is_missing_or_changed_is_refused_in_one_line(
    saved: Path, tmp_path: Path, spoil: Callable[[Path], None], error: type[S2PError], words: str
) -> None:
    folder = tmp_path / "spoiled"
    shutil.copytree(saved, folder)
    spoil(folder)
    with pytest.raises(error, match=words) as refused:
        DiffusionPipeline.from_pretrained(folder)
    assert "\n" not in str(refused.value)


def test_a_pipeline_with_an_engine_is_not_calibrated(saved: Path) -> None:
    with pytest.raises(InputError, match=r"the unet is a EngineUNet .* give a floating-point pipeline of diffusers"):
        resolve_base(str(saved))


def test_an_engine_is_not_spread_over_devices(saved: Path) -> None:
    with pytest.raises(InputError, match="leave device_map out, or name one device"):
        DiffusionPipeline.from_pretrained(saved, device_map="balanced")
    for options in ({}, {"device_map": "cpu"}):
        DiffusionPipeline.from_pretrained(saved, **options).unet.close()


def test_an_engine_of_another_environment_is_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s2p_deploy.engines.load.usable_backend", _unusable)
    with pytest.raises(MissingEnvironmentError, match="onnxruntime is not here"):
        DiffusionPipeline.from_pretrained(saved)


def _unusable(name: str) -> None:
    raise MissingEnvironmentError(f"{name} is not here")


def test_component_engines_are_saved_each_with_its_own_networks(
    engine: Engine, parts: ComponentEngines, tmp_path: Path
) -> None:
    folder = tmp_path / "whole"
    with open_pipeline(engine, components=parts) as opened:
        opened.pipe.save_pretrained(folder)
        opened.pipe.save_pretrained(folder)
        expected = drawn(opened.pipe)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    assert index["text_encoder"] == ["s2p_deploy.pipeline.components", "EngineTextEncoder"]
    assert {*open_artifact(folder / "vae", "ComponentEngines").content["networks"]} == {"vae_decoder", "vae_encoder"}
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert (type(pipe.text_encoder), type(pipe.vae)) == (EngineTextEncoder, EngineAutoencoder)
    np.testing.assert_array_equal(drawn(pipe), expected)
    networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert not sum(parameter.numel() for part in networks for parameter in part.parameters())
    with pytest.raises(InputError, match=r"are of several artifacts: use pipe\.save_pretrained"):
        save_engine_pipeline(pipe, tmp_path / "one")
    pipe.save_pretrained(tmp_path / "other")  # as the advice says
    file = next((folder / "vae").glob("vae_decoder*"))
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(IntegrityError, match="was changed after it was written"):
        DiffusionPipeline.from_pretrained(folder)
    with pytest.raises(InputError, match="has the engines of 2 components: give them to open_pipeline"):
        EngineTextEncoder.from_pretrained(os.fspath(parts.folder))
    open_pipeline(engine, components=ComponentEngines.open(parts.folder)).close()
