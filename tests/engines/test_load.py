"""Loading: checked first, on the bytes that are loaded."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from s2p_deploy.engines import check_scales, load_engine
from s2p_deploy.errors import InputError, IntegrityError, MissingEnvironmentError
from s2p_deploy.records import Engine, ScaleTable
from tests.engines.conftest import EngineOf, GraphOf
from tests.engines.small_graph import CALIBRATED, POINTS, small_inputs, small_scales


@pytest.fixture
def engine(engine_of: EngineOf) -> Engine:
    return engine_of("onnxruntime", "reference", "int8")


@pytest.mark.parametrize(("backend", "hint"), [("onnxruntime", "reference"), ("openvino", "f32")])
def test_one_changed_byte_in_any_engine_file_is_refused(
    engine_of: EngineOf, tmp_path: Path, backend: str, hint: str
) -> None:
    engine = engine_of(backend, hint, "int8")
    for name in engine.engine_files:
        copy = tmp_path / f"{backend}-{name}"
        shutil.copytree(engine.folder, copy)
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
        with pytest.raises(IntegrityError, match=name):
            load_engine(Engine.open(copy))


def test_a_changed_scale_table_is_refused(engine: Engine, tmp_path: Path) -> None:
    shutil.copytree(engine.folder, tmp_path / "copy")
    file = tmp_path / "copy" / "act_scales.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(IntegrityError, match="act_scales"):
        Engine.open(tmp_path / "copy")


def test_an_engine_of_another_graph_is_refused(engine: Engine, graph_of: GraphOf) -> None:
    load_engine(engine, graph_of("fp32", "int8")).close()
    with pytest.raises(IntegrityError, match="engine of another graph"):
        load_engine(engine, graph_of("fp32", "int4"))


@pytest.mark.parametrize(
    ("key", "value"), [("onnxruntime", "0.1.0"), ("device", "CUDA GPU"), ("platform", "plan9-mips")]
)
def test_another_environment_is_named(engine: Engine, key: str, value: str) -> None:
    elsewhere = replace(engine, environment=engine.environment | {key: value})
    with pytest.raises(MissingEnvironmentError, match=f"needs {key} {value}, here it is "):
        load_engine(elsewhere)


def unchecked(scales: np.ndarray) -> ScaleTable:
    """A table that did not go through its own checks, as after a slip in memory."""
    table = ScaleTable(small_scales(), POINTS, CALIBRATED)
    object.__setattr__(table, "scales", scales)
    return table


@pytest.mark.parametrize("value", [0.0, -0.03, np.nan, np.inf, 1e-4, 10.0])
def test_a_scale_that_export_did_not_check_is_refused(engine: Engine, value: float) -> None:
    scales = small_scales()
    scales[700, 1] = value
    with pytest.raises(InputError, match="scale of to_q at row 700"):
        load_engine(engine, scales=unchecked(scales))


def test_a_table_of_another_model_is_refused(engine: Engine) -> None:
    with pytest.raises(InputError, match="other points"):
        check_scales(engine, ScaleTable(small_scales(), ("conv", "to_k"), CALIBRATED))
    with pytest.raises(InputError, match="500 rows"):
        check_scales(engine, ScaleTable(small_scales()[:500], POINTS, CALIBRATED))


def test_other_scales_in_range_are_bound(engine: Engine) -> None:
    collapsed = np.broadcast_to(np.sqrt(small_scales()[0] * small_scales()[-1]), small_scales().shape).astype(
        np.float32
    )
    inputs = small_inputs()
    with load_engine(engine) as own, load_engine(engine, scales=ScaleTable(collapsed, POINTS, CALIBRATED)) as other:
        a, b = (runner.infer(inputs)["noise_pred"] for runner in (own, other))
    assert not np.array_equal(a, b)
