from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.records import Base, ComponentEngines, Engine, ScaleTable, ShapeProfile, TimestepTable, write_artifact
from s2p_deploy.records.artifacts import _sealed_text
from s2p_deploy.records.scale_table import write_scale_table, write_timestep_table

BASE = Base("somewhere", "b" * 64)
TENSOR = {"name": "sample", "dtype": "float32", "shape": ["batch", 4, 8, 8]}
ENGINE = {
    "backend": "onnxruntime",
    "precision": "f32",
    "provider": "cpu",
    "optimization": None,
    "dtype": "fp32",
    "inputs": [TENSOR],
    "outputs": [TENSOR | {"name": "noise_pred"}],
    "layers": [],
    "engine_files": ["denoiser.onnx"],
    "sizes": {"denoiser.onnx": 10},
    "environment": {"device": "cpu"},
    "denoiser_config": {},
    "quantizers": {"conv": {"reference_scale": 0.03, "lowest": 0.02, "highest": 0.04}},
    "profile": {"minimum": 1, "optimum": 2, "maximum": 4},
    "notes": {"any": "key that this version does not read"},
}


def write_engine(folder: Path, change: dict[str, Any], column: str = "conv", parent: str = "graph") -> Path:
    """An engine around ten bytes, made of some graph."""

    def fill(out: Path) -> dict[str, Any]:
        (out / "denoiser.onnx").write_bytes(b"0123456789")
        write_scale_table(ScaleTable(np.ones((4, 1), np.float32), (column,), (0,)), out / "act_scales.safetensors")
        write_timestep_table(TimestepTable("DDIM", {}, 1, (0.0,), np.linspace(0, 1, 4)), out / "timesteps.json")
        return ENGINE | change

    graph = write_artifact(folder / "graph", kind="Graph", base=BASE, recipe={}, fill=lambda _: {})
    parents = {parent: (folder / "graph", graph)}
    write_artifact(folder / "engine", kind="Engine", base=BASE, recipe={}, fill=fill, parents=parents)
    return folder / "engine"


def test_an_engine_is_read_with_the_types_of_its_record(tmp_path: Path) -> None:
    engine = Engine.open(write_engine(tmp_path, {}))
    assert engine.inputs[0].shape == ("batch", 4, 8, 8)
    assert engine.profile == ShapeProfile(1, 2, 4)
    assert engine.quantizers["conv"].lowest == 0.02
    assert (engine.engine_files, engine.added_width, engine.mixed_timesteps) == (("denoiser.onnx",), 0, True)


@pytest.mark.parametrize(
    "change",
    [
        {"backend": None},
        {"precision": 3},
        {"dtype": "bf16"},
        {"inputs": [TENSOR | {"dtype": "object"}]},
        {"inputs": [TENSOR | {"shape": [-1]}]},
        {"inputs": [TENSOR, TENSOR]},
        {"engine_files": []},
        {"engine_files": ["other"]},
        {"sizes": {"denoiser.onnx": -1}},
        {"environment": {"device": 1}},
        {"quantizers": {"conv": {"reference_scale": 0.03, "lowest": 0.04, "highest": 0.02}}},
        {"quantizers": {"conv": {"reference_scale": float("nan"), "lowest": 0.02, "highest": 0.04}}},
        {"profile": {"minimum": 1, "optimum": 10**9, "maximum": 4}},
        {"added_width": -1},
        {"added_width": 2**40},
        {"layers": [{"name": "conv"}]},
        {"options": {"static_tolerance": -1}},
        {"lowerings": {"conv": "other"}},
        {"engine_files": ["missing.onnx"], "sizes": {"missing.onnx": 10}},
        {"engine_files": ["timesteps.json"], "sizes": {"timesteps.json": 10}},
    ],
)
def test_nonsense_in_an_engine_is_refused_in_one_line(tmp_path: Path, change: dict[str, object]) -> None:
    folder = write_engine(tmp_path, change)
    with pytest.raises(IntegrityError, match=r"manifest\.json") as caught:
        Engine.open(folder)
    assert "\n" not in str(caught.value)


def test_the_field_is_named(tmp_path: Path) -> None:
    folder = write_engine(tmp_path, {"inputs": [TENSOR | {"dtype": "object"}]})
    with pytest.raises(IntegrityError, match=r"manifest\.json is damaged: inputs\.0\.dtype: string should match"):
        Engine.open(folder)


def test_an_engine_that_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="activation quantizer other is not described"):
        Engine.open(write_engine(tmp_path / "a", {}, column="other"))
    with pytest.raises(IntegrityError, match="does not say which graph"):
        Engine.open(write_engine(tmp_path / "b", {}, parent="dataset"))


NETWORK = {"files": ["vae.onnx"], "input": TENSOR, "outputs": [TENSOR], "config": {}}
COMPONENTS = {
    "backend": "onnxruntime",
    "precision": "f32",
    "provider": "cpu",
    "optimization": "full",
    "environment": {},
    "networks": {"vae_decoder": NETWORK},
    "sizes": {"vae.onnx": 3},
}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"networks": {}},
        {"networks": {"vae_decoder": NETWORK, "vae_encoder": NETWORK}},
        {"networks": {"vae_decoder": NETWORK | {"outputs": []}}},
        {"networks": {"vae_decoder": NETWORK | {"more": 1}}},
        {"sizes": {}},
        {"sizes": {"vae.onnx": -1}},
        {"sizes": {"vae.onnx": 3, "other.onnx": 3}},
        {"provider": 1},
    ],
)
def test_component_engines_are_checked(tmp_path: Path, change: dict[str, object]) -> None:
    def fill(out: Path) -> dict[str, Any]:
        (out / "vae.onnx").write_bytes(b"abc")
        return COMPONENTS | change

    write_artifact(tmp_path / "a", kind="ComponentEngines", base=BASE, recipe={}, fill=fill)
    if not change:
        assert ComponentEngines.open(tmp_path / "a").networks["vae_decoder"].files == ("vae.onnx",)
        return
    with pytest.raises(IntegrityError, match=r"manifest\.json is damaged"):
        ComponentEngines.open(tmp_path / "a")


def test_an_artifact_of_an_older_version_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_engine(tmp_path, {})
    data = json.loads((folder / "manifest.json").read_text())
    data.pop("seal")
    (folder / "manifest.json").write_text(_sealed_text(data | {"schema": 1}))
    with pytest.raises(InputError, match=r"engine has schema 1, this version reads 2: make the artifact again$"):
        Engine.open(folder)
