"""Engines of the input form: bound to nothing, their rows are the training timesteps; schedules add theirs."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from s2p_deploy.engines import BoundRunner, build_engine, load_engine, usable_backend
from s2p_deploy.engines.conditioning import PromptFeatures, StoredFeatures
from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.export import export_graph
from s2p_deploy.families import TimePath
from s2p_deploy.records import (
    Base,
    Engine,
    ScaleTable,
    TensorSpec,
    TimestepTable,
    write_artifact,
)
from s2p_deploy.records.artifacts import _sealed_text, file_digest
from s2p_deploy.records.scale_table import write_scale_table, write_timestep_table
from s2p_deploy.timesteps import scales_for_schedule, timestep_indices
from tests.artifacts import tiny_calibrated, tiny_inputs, tiny_unet
from tests.engines.conftest import EngineOf

CALIBRATED = (1, 201, 401, 601, 801, 981)
TIMESTEPS = TimestepTable("DDIMScheduler", {}, 6, CALIBRATED, np.linspace(0.03, 1.5, 1000))
SCALES = ScaleTable(np.geomspace(0.01, 1, 1000)[:, None].astype(np.float32), ("conv",), CALIBRATED)
FEATURES = np.float32([[0.001, 0.002]])  # of timestep 1
WEIGHTS = np.float32([[1, 10], [2, 20], [3, 30]])  # of added_cond


def telling_model() -> onnx.ModelProto:
    """noise_pred [batch, 3]: the row's scale beside its two features; what was bound can be read back."""
    tell = [
        helper.make_node("Gather", ["act_scales", "timestep_index"], ["scale"], axis=0),
        helper.make_node("Concat", ["scale", "time_projections"], ["told"], axis=1),
        helper.make_node("Mul", ["told", "sample"], ["noise_pred"]),
    ]
    return model_of(tell, INPUTS, [OUTPUT], [])


def conditioning_model(added: int) -> onnx.ModelProto:
    """time_projections [rows, 2] = timestep * FEATURES, and where there is one, added_cond @ WEIGHTS added to it."""
    result = "of_time" if added else "time_projections"
    nodes = [
        helper.make_node("Unsqueeze", ["timesteps", "axis"], ["column"]),
        helper.make_node("MatMul", ["column", "features"], [result]),
    ]
    constants = [numpy_helper.from_array(np.int64([1]), "axis"), numpy_helper.from_array(FEATURES, "features")]
    inputs = [TensorSpec("timesteps", "float32", ("timesteps",))]
    if added:
        nodes += [
            helper.make_node("MatMul", ["added_cond", "weights"], ["of_prompt"]),
            helper.make_node("Add", ["of_time", "of_prompt"], ["time_projections"]),
        ]
        constants.append(numpy_helper.from_array(WEIGHTS, "weights"))
        inputs.append(TensorSpec("added_cond", "float32", ("timesteps", added)))
    return model_of(nodes, inputs, [TensorSpec("time_projections", "float32", ("timesteps", 2))], constants)


INPUTS = [
    TensorSpec("sample", "float32", ("batch", 3)),
    TensorSpec("timestep_index", "int64", ("batch",)),
    TensorSpec("act_scales", "float32", ("timesteps", 1)),
    TensorSpec("time_projections", "float32", ("batch", 2)),
]
OUTPUT = TensorSpec("noise_pred", "float32", ("batch", 3))


def model_of(
    nodes: list[Any], inputs: list[TensorSpec], outputs: list[TensorSpec], constants: list[Any]
) -> onnx.ModelProto:
    types = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}

    def infos(specs: list[TensorSpec]) -> list[Any]:
        return [helper.make_tensor_value_info(s.name, types[s.dtype], s.shape) for s in specs]

    graph = helper.make_graph(nodes, "told", infos(inputs), infos(outputs), constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def telling_engine(folder: Path, added: int) -> Engine:
    base = Base("told", "0" * 64)
    graph = write_artifact(folder / "graph", kind="ExportedGraph", base=base, recipe={}, fill=lambda _: {})

    def fill(out: Path) -> dict[str, Any]:
        onnx.save(telling_model(), out / "denoiser.onnx")
        onnx.save(conditioning_model(added), out / "conditioning.onnx")
        write_scale_table(SCALES, out / "act_scales.safetensors")
        write_timestep_table(TIMESTEPS, out / "timesteps.json")
        return {
            "backend": "onnxruntime",
            "precision": "f32",
            "provider": "cpu",
            "optimization": "reference",
            "dtype": "fp32",
            "inputs": [asdict(spec) for spec in INPUTS],
            "outputs": [asdict(OUTPUT)],
            "layers": [],
            "engine_files": ["denoiser.onnx"],
            "sizes": {"denoiser.onnx": (out / "denoiser.onnx").stat().st_size},
            "environment": usable_backend("onnxruntime").environment(),
            "denoiser_config": {},
            "added_width": added,
            "quantizers": {"conv": {"reference_scale": 0.1, "lowest": 0.01, "highest": 1.0}},
            "profile": {"minimum": 1, "optimum": 2, "maximum": 8},
            "options": {"static_tolerance": 0.0},
        }

    parents = {"graph": (folder / "graph", graph)}
    write_artifact(folder / "engine", kind="Engine", base=base, recipe={}, fill=fill, parents=parents)
    return Engine.open(folder / "engine")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """An engine of the input form whose output is what it was given for a row."""
    return telling_engine(tmp_path_factory.mktemp("told"), 0)


@pytest.fixture(scope="module")
def prompted(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The same with features that depend on an ``added_cond`` of three values too."""
    return telling_engine(tmp_path_factory.mktemp("prompted"), 3)


def loaded(engine: Engine, **options: Any) -> BoundRunner:  # noqa: ANN401 - options of load_engine
    return load_engine(engine, tried=True, **options)


def told(runner: BoundRunner, rows: np.ndarray, **more: np.ndarray) -> np.ndarray:
    inputs = {"sample": np.ones((len(rows), 3), np.float32), "timestep_index": rows}
    return runner.infer(inputs | more)["noise_pred"]


def test_bound_to_nothing_rows_are_the_training_timesteps(engine: Engine) -> None:
    rows = np.asarray([0, 1, 500, 999])
    with loaded(engine) as runner:
        assert len(runner.timesteps) == 1000
        found = told(runner, rows)
    assert found[:, :1].tobytes() == SCALES.scales[rows].tobytes()
    assert found[:, 1:] == pytest.approx(rows[:, None] * FEATURES)


def test_rows_of_several_schedules_stand_beside_the_training_timesteps(engine: Engine) -> None:
    schedules = [[981.0, 700.25, 1.0], [137.625, 700.25]]  # they share a timestep
    with loaded(engine, schedules=schedules) as runner:
        assert runner.timesteps.timesteps[1000:].tolist() == [137.625, 700.25]
        asked = np.asarray([700.25, 137.625, 981, 137.625])
        found = told(runner, timestep_indices(asked, runner.timesteps))
        expected = scales_for_schedule(SCALES, TIMESTEPS, runner.timesteps).scales[[1001, 1000, 981, 1000]]
    assert np.array_equal(found[:, :1], expected)
    assert found[:, 1:] == pytest.approx(asked[:, None] * FEATURES)


def test_a_row_that_is_not_bound_is_refused(engine: Engine) -> None:
    with loaded(engine) as runner, pytest.raises(InputError, match="indices are 0 to 999"):
        told(runner, np.asarray([1000]))


def test_features_are_not_given_per_step(engine: Engine) -> None:
    with loaded(engine) as runner, pytest.raises(InputError, match="no input 'time_projections'"):
        runner.infer({"timestep_index": np.asarray([1]), "time_projections": np.ones((1, 2), np.float32)})


def test_the_constant_form_refuses_fractional_schedules_when_it_is_loaded(engine_of: EngineOf) -> None:
    constant = engine_of("onnxruntime", "reference", "int8")
    load_engine(constant, schedules=[[981, 501, 1]]).close()
    with pytest.raises(InputError, match="fractional: this schedule needs an engine exported with --time-table input"):
        load_engine(constant, schedules=[[981, 500.5]])


def test_schedules_outside_the_covered_range_are_refused(engine: Engine, engine_of: EngineOf) -> None:
    for one in (engine, engine_of("onnxruntime", "reference", "int8")):
        low = replace(one, timesteps=replace(one.timesteps, calibrated=(1, 601)))
        with pytest.raises(InputError, match=r"timestep 700 is outside the calibrated table \(0 to 661\)"):
            loaded(low, schedules=[[601, 700]])


def test_scales_of_other_timesteps_are_refused(engine: Engine) -> None:
    with pytest.raises(InputError, match="500 timesteps"):
        loaded(engine, scales=ScaleTable(SCALES.scales[:500], SCALES.quantizers, CALIBRATED))


def test_a_changed_conditioning_graph_is_refused(engine: Engine, tmp_path: Path) -> None:
    shutil.copytree(engine.folder, tmp_path / "copy")
    opened, file = Engine.open(tmp_path / "copy"), tmp_path / "copy" / "conditioning.onnx"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"conditioning\.onnx"):
        Engine.open(tmp_path / "copy")
    with pytest.raises(IntegrityError, match=r"conditioning\.onnx"):
        loaded(opened)  # changed after it was opened


@pytest.mark.parametrize("kind", ["missing", "no ONNX", "another graph", "not finite"])
def test_what_is_no_conditioning_graph_is_refused_under_a_right_manifest(
    engine: Engine, tmp_path: Path, kind: str
) -> None:
    copy, name = tmp_path / "copy", "conditioning.onnx"
    shutil.copytree(engine.folder, copy)
    if kind == "not finite":
        text = (copy / name).read_bytes().replace(FEATURES.tobytes(), np.float32([np.inf, 1]).tobytes())
    else:
        text = b"nothing" if kind == "no ONNX" else (copy / "denoiser.onnx").read_bytes()
    (copy / name).write_bytes(text)
    files = {file: file_digest(copy / file) for file in engine.manifest.files if kind != "missing" or file != name}
    if kind == "missing":
        (copy / name).unlink()
    (copy / "manifest.json").write_text(_sealed_text(asdict(replace(engine.manifest, files=files))))
    with pytest.raises(IntegrityError, match=r"conditioning|no ONNX model"):
        loaded(Engine.open(copy))


ADDED = np.float32([[1, 0, 0], [0, 1, 0.5]])


def test_features_follow_the_prompt_and_the_row(prompted: Engine) -> None:
    asked = np.asarray([700.25, 981])
    with loaded(prompted, schedules=[[981.0, 700.25, 1.0]]) as runner:
        assert [spec.name for spec in runner.inputs] == ["sample", "timestep_index", "added_cond"]
        assert runner.inputs[-1].shape == ("batch", 3)
        rows = timestep_indices(asked, runner.timesteps)
        found = [told(runner, rows, added_cond=added) for added in (ADDED, ADDED[::-1], ADDED)]
    for added, output in zip((ADDED, ADDED[::-1], ADDED), found, strict=True):
        assert output[:, 1:] == pytest.approx(asked[:, None] * FEATURES + added @ WEIGHTS)


def test_rows_that_no_schedule_asked_for_have_features_too(prompted: Engine) -> None:
    rows = np.asarray([0, 500])
    with loaded(prompted) as runner:
        found = told(runner, rows, added_cond=ADDED)
    assert found[:, 1:] == pytest.approx(rows[:, None] * FEATURES + ADDED @ WEIGHTS)


def test_a_prompt_is_asked_for_by_name(prompted: Engine) -> None:
    with loaded(prompted) as runner:
        with pytest.raises(InputError, match="the engine needs an input 'added_cond'"):
            told(runner, np.asarray([1]))
        with pytest.raises(InputError, match=r"added_cond has shape \[1, 2\], the engine takes \[1, 3\]"):
            told(runner, np.asarray([1]), added_cond=np.ones((1, 2), np.float32))


def test_an_engine_without_a_prompt_takes_none(engine: Engine) -> None:
    with loaded(engine) as runner, pytest.raises(InputError, match="no input 'added_cond'"):
        told(runner, np.asarray([1]), added_cond=ADDED[:1])


def test_a_conditioning_graph_of_another_width_is_refused_when_it_is_loaded(prompted: Engine) -> None:
    with pytest.raises(IntegrityError, match=r"conditioning\.onnx"):
        loaded(replace(prompted, added_width=4))


class Counted:
    """A condition that counts: features [n, 2] are timestep and first value of the prompt."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[float], float]] = []

    def __call__(self, timesteps: np.ndarray, added_cond: np.ndarray) -> np.ndarray:
        assert len(set(map(tuple, added_cond))) == 1, "one prompt at a time"
        self.asked.append((timesteps.tolist(), float(added_cond[0, 0])))
        return np.stack([timesteps, added_cond[:, 0]], 1)


def prompt(value: float, batch: int = 1) -> np.ndarray:
    return np.full((batch, 3), value, np.float32)


def test_a_prompt_is_computed_once_for_all_rows_ahead() -> None:
    condition = Counted()
    features = PromptFeatures(condition, np.arange(10.0), ahead=(7, 4, 2), added_width=3)
    for row in (7, 4, 2, 4):
        assert features.of(np.asarray([row, row]), prompt(1, 2)).tolist() == [[row, 1]] * 2
    assert condition.asked == [([7, 4, 2], 1)]
    assert features.of(np.asarray([4, 2]), np.concatenate([prompt(1), prompt(5)])).tolist() == [[4, 1], [2, 5]]
    assert condition.asked[1:] == [([2, 7, 4], 5)], "both branches of a guided step are kept side by side"


def test_another_row_is_computed_when_it_is_asked_for() -> None:
    condition = Counted()
    features = PromptFeatures(condition, np.arange(10.0), ahead=(7,), added_width=3)
    for _ in range(2):
        assert features.of(np.asarray([7, 3]), prompt(1, 2)).tolist() == [[7, 1], [3, 1]]
    assert condition.asked == [([7], 1), ([3], 1)]


def test_the_prompts_used_last_are_kept_in_so_many_bytes() -> None:
    condition = Counted()
    row = condition(np.float32([0]), prompt(0))
    features = PromptFeatures(condition, np.arange(10.0), (0, 1), 3, most_bytes=4 * row.nbytes)  # two prompts

    def ask(value: float) -> int:
        before = len(condition.asked)
        assert features.of(np.asarray([1]), prompt(value)).tolist() == [[1, value]]
        return len(condition.asked) - before

    assert [ask(value) for value in (1, 2, 1, 3, 1, 3)] == [1, 1, 0, 1, 0, 0]
    assert ask(2) == 1, "it was used longest ago when the third came"
    assert [ask(1), ask(3)] == [1, 1]


def test_one_prompt_is_kept_however_large_it_is() -> None:
    condition = Counted()
    features = PromptFeatures(condition, np.arange(10.0), tuple(range(10)), 3, most_bytes=1)
    for row in range(10):
        features.of(np.asarray([row]), prompt(1))
    assert len(condition.asked) == 1
    both = np.concatenate([prompt(1), prompt(2)])
    assert features.of(np.asarray([3, 3]), both).tolist() == [[3, 1], [3, 2]]


def test_stored_features_are_rows_of_their_table() -> None:
    table = np.arange(6.0).reshape(3, 2)
    features = StoredFeatures(table)
    assert features.added_width == 0
    assert features.of(np.asarray([2, 0])).tolist() == [[4, 5], [0, 1]]


@pytest.mark.slow
def test_both_forms_of_an_exported_model_agree(tmp_path: Path) -> None:
    calibrated = tiny_calibrated(tmp_path / "calib")
    constant = export_graph(calibrated, tmp_path / "constant")
    given = export_graph(calibrated, tmp_path / "input", time_table="input", time_path=TimePath(tiny_unet()))
    outputs = []
    for graph, backend in ((constant, "onnxruntime"), (given, "onnxruntime"), (given, "openvino")):
        built = build_engine(graph, tmp_path / f"{graph.folder.name}-{backend}", backend=backend)
        with load_engine(built, graph) as runner:
            outputs.append(runner.infer(tiny_inputs(3))["noise_pred"])
        if graph is given:
            with load_engine(built, graph, schedules=[[137.625]]) as runner:
                assert np.array_equal(runner.infer(tiny_inputs(3))["noise_pred"], outputs[-1])
    # the features differ in the last bits, and rounding flips amplify from block to block
    assert sqnr(outputs[0], outputs[1]) > 25
    assert sqnr(outputs[0], outputs[2]) > 20


def sqnr(reference: np.ndarray, other: np.ndarray) -> float:
    a, b = reference.astype(np.float64), other.astype(np.float64)
    return float(10 * np.log10((a**2).mean() / max(((a - b) ** 2).mean(), 1e-30)))
