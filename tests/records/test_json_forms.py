from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from s2p_deploy.errors import IntegrityError
from s2p_deploy.records import GraphBlock, GraphSite, SitePrecision, TensorSpec
from s2p_deploy.records.exported_graph import GraphTap
from s2p_deploy.records.json_forms import (
    BlockForm,
    EngineContent,
    PrecisionForm,
    SiteForm,
    TapForm,
    TensorForm,
    check_engine,
)
from s2p_deploy.records.strict import Strict, checked
from s2p_deploy.records.timestep_table import timestep_table_from_bytes

TABLE = {
    "scheduler_class": "DDIMScheduler",
    "scheduler_config": {},
    "steps": 3,
    "calibrated": [0, 2],
    "angle": [0.0, 0.5, 1.0, 1.5],
}
TENSOR = {"name": "sample", "dtype": "float32", "shape": ["batch", 4, 8, 8]}
ENGINE = {
    "backend": "onnxruntime",
    "hint": "reference",
    "dtype": "fp32",
    "inputs": [TENSOR],
    "outputs": [TENSOR | {"name": "noise_pred"}],
    "sites": [],
    "engine_files": ["denoiser.onnx"],
    "sizes": {"denoiser.onnx": 10},
    "environment": {"device": "cpu"},
    "denoiser_config": {},
    "points": {"conv": {"centre": 0.03, "lowest": 0.02, "highest": 0.04}},
    "profile": {"minimum": 1, "optimum": 2, "maximum": 4},
}


@pytest.mark.parametrize(
    ("form", "record"),
    [
        (TensorForm, TensorSpec),
        (SiteForm, GraphSite),
        (TapForm, GraphTap),
        (BlockForm, GraphBlock),
        (PrecisionForm, SitePrecision),
    ],
)
def test_a_form_has_the_fields_of_its_record(form: type[Strict], record: type) -> None:
    assert set(form.model_fields) == {field.name for field in dataclasses.fields(record)}


def test_what_is_written_passes() -> None:
    form = checked(EngineContent, ENGINE | {"notes": {}}, Path("m"))
    check_engine(form, {"denoiser.onnx": ""}, {"graph": None}, ("conv",), Path("m"))
    assert timestep_table_from_bytes(json.dumps(TABLE).encode(), Path("t")).rows == 4
    further = TABLE | {"calibrated": [0, 1.5, 2.25], "fractional": [1.5, 2.25]}
    assert timestep_table_from_bytes(json.dumps(further).encode(), Path("t")).calibrated_rows == (0, 4, 5)
    alone = TABLE | {"calibrated": [0, 1.5], "fractional": [0, 1.5, 3]}
    assert timestep_table_from_bytes(json.dumps(alone).encode(), Path("t")).calibrated_rows == (0, 1)
    flow = further | {"flow_matching": True, "calibrated": [1.5]}
    assert timestep_table_from_bytes(json.dumps(flow).encode(), Path("t")).calibrated_rows == (0,)


@pytest.mark.parametrize(
    "change",
    [
        {"backend": None},
        {"hint": 3},
        {"dtype": "bf16"},
        {"inputs": [TENSOR | {"dtype": "object"}]},
        {"inputs": [TENSOR | {"shape": [-1]}]},
        {"inputs": [TENSOR, TENSOR]},
        {"engine_files": []},
        {"engine_files": ["other"]},
        {"sizes": {"denoiser.onnx": -1}},
        {"environment": {"device": 1}},
        {"points": {"conv": {"centre": 0.03, "lowest": 0.04, "highest": 0.02}}},
        {"points": {"conv": {"centre": float("nan"), "lowest": 0.02, "highest": 0.04}}},
        {"profile": {"minimum": 1, "optimum": 10**9, "maximum": 4}},
        {"added_cond": -1},
        {"added_cond": 2**40},
        {"sites": [{"site": "conv"}]},
    ],
)
def test_nonsense_in_an_engine_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(IntegrityError, match="m is damaged"):
        checked(EngineContent, ENGINE | change, Path("m"))


def test_parts_that_do_not_belong_together_are_refused() -> None:
    form = checked(EngineContent, ENGINE, Path("m"))
    for files, parents, points in (
        ({}, {"graph": None}, ("conv",)),
        ({"denoiser.onnx": ""}, {}, ("conv",)),
        ({"denoiser.onnx": ""}, {"graph": None}, ("other",)),
    ):
        with pytest.raises(IntegrityError):
            check_engine(form, files, parents, points, Path("m"))


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"steps": True},
        {"calibrated": []},
        {"calibrated": [2, 0]},
        {"calibrated": [0, 4]},
        {"calibrated": [-1]},
        {"calibrated": [0.5]},
        {"calibrated": [0, 2], "flow_matching": True},
        {"fractional": [1.5, 0.5]},
        {"fractional": [0.5, 0.5]},
        {"fractional": [1.0]},
        {"fractional": [-0.5]},
        {"fractional": [0.0, 1.5]},
        {"fractional": [0.0, 1.5], "calibrated": [0, 1]},
        {"fractional": [float("nan")]},
        {"fractional": [float("inf")]},
        {"angle": []},
        {"angle": [0.0, 0.5, 1.0, 9.0]},
        {"angle": [1.0, 0.5, 1.0, 1.5]},
        {"angle": [0.0, 0.5, 1.0, float("nan")]},
        {"scheduler_config": []},
        {"scheduler_class": 1},
    ],
)
def test_nonsense_in_a_timestep_table_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(IntegrityError, match="t is damaged"):
        timestep_table_from_bytes(json.dumps(TABLE | change).encode(), Path("t"))
