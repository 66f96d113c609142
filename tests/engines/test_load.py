"""Loading: checked first, on the bytes that are loaded."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from s2p_deploy.child_process import Limits, call
from s2p_deploy.engines import Runner, backend_by_name, build_engine, check_scales, load_engine
from s2p_deploy.engines.load import check_environment, try_in_child
from s2p_deploy.engines.onnx_files import read_onnx
from s2p_deploy.engines.onnxruntime.backend import OnnxRuntimeBackend
from s2p_deploy.errors import InputError, IntegrityError, MissingEnvironmentError, S2PError
from s2p_deploy.records import Engine, ExportedGraph, ScaleTable
from s2p_deploy.records.artifacts import verified_files
from tests.engines.conftest import EngineOf, GraphOf
from tests.engines.small_graph import CALIBRATED, POINTS, small_inputs, small_scales
from tests.engines.stand_in_gpu import stand_in_gpus
from tests.mutations.sealing import seal_anew
from tests.open_runners import watch_runners


@pytest.fixture
def engine(engine_of: EngineOf) -> Engine:
    return engine_of("onnxruntime", "reference", "int8")


@pytest.mark.parametrize(("backend", "mode"), [("onnxruntime", "reference"), ("openvino", "f32")])
def test_one_changed_byte_in_any_engine_file_is_refused(
    engine_of: EngineOf, tmp_path: Path, backend: str, mode: str
) -> None:
    engine = engine_of(backend, mode, "int8")
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
    with pytest.raises(InputError, match="scale of to_q at timestep index 700"):
        load_engine(engine, scales=unchecked(scales))


def test_a_table_of_another_model_is_refused(engine: Engine) -> None:
    with pytest.raises(InputError, match="other quantizers"):
        check_scales(engine, ScaleTable(small_scales(), ("conv", "to_k"), CALIBRATED))
    with pytest.raises(InputError, match="500 timesteps"):
        check_scales(engine, ScaleTable(small_scales()[:500], POINTS, CALIBRATED))


def test_other_scales_in_range_are_bound(engine: Engine) -> None:
    collapsed = np.broadcast_to(np.sqrt(small_scales()[0] * small_scales()[-1]), small_scales().shape).astype(
        np.float32
    )
    inputs = small_inputs()
    with load_engine(engine) as own, load_engine(engine, scales=ScaleTable(collapsed, POINTS, CALIBRATED)) as other:
        a, b = (runner.infer(inputs)["noise_pred"] for runner in (own, other))
    assert not np.array_equal(a, b)


def sealed_anew(engine: Engine, folder: Path, name: str, data: bytes) -> Engine:
    """A copy with another file, whose digests and seal fit."""
    shutil.copytree(engine.folder, folder)
    (folder / name).write_bytes(data)
    seal_anew(folder)
    return Engine.open(folder)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "s2p_deploy" / "tried"


def test_an_engine_of_elsewhere_is_tried_once_in_a_child_process(
    engine: Engine, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_engine(engine).close()
    assert [path.name for path in own_cache.iterdir()] == [engine.manifest.digest]
    monkeypatch.setattr(sys, "executable", "/nowhere/python")  # a second trial would need it
    load_engine(engine).close()


def test_the_device_reaches_the_trial_and_the_backend(
    engine: Engine, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def note(_: str, message: dict[str, str], limits: Limits) -> dict[str, object]:
        tried.append(message["device"])
        return try_in_child(message)

    monkeypatch.setattr("s2p_deploy.engines.load.call", note)
    loaded: list[str] = []
    own = OnnxRuntimeBackend.load

    def load(self: OnnxRuntimeBackend, *given: Any) -> Runner:  # noqa: ANN401 - as the backend's
        loaded.append(given[-1])
        return own(self, *given)

    monkeypatch.setattr(OnnxRuntimeBackend, "load", load)
    load_engine(engine, device="cuda:1").close()
    assert (tried, loaded) == (["cuda:1"], ["cuda:1", "cuda:1"])


def test_the_gpu_that_was_asked_for_must_be_the_engines_kind(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_gpus(monkeypatch)
    backend = backend_by_name("tensorrt")
    built = replace(engine, backend="tensorrt", environment=backend.environment(device="cuda:1"))
    check_environment(built, backend, "cuda:1")
    with pytest.raises(MissingEnvironmentError, match=r"needs compute_capability 8\.9, here it is 8\.6"):
        check_environment(built, backend, "cuda:0")


def test_what_a_backend_cannot_load_is_refused_by_the_trial(engine: Engine, tmp_path: Path, own_cache: Path) -> None:
    model = onnx.load_model(engine.folder / "denoiser.onnx", load_external_data=False)
    del model.graph.node[3]
    spoiled = sealed_anew(engine, tmp_path / "copy", "denoiser.onnx", model.SerializeToString())
    with pytest.raises(IntegrityError, match="a trial run in a child process failed"):
        load_engine(spoiled)
    assert not own_cache.exists() or not list(own_cache.iterdir())


def test_memory_that_runs_out_in_the_trial_is_called_by_its_name(
    engine: Engine, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is as good as it was: another machine, or a smaller profile, runs it."""
    (tmp_path / "greedy.py").write_text(
        "def load(message):\n    return {'kept': [bytearray(2**26) for _ in range(64)]}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def call_greedy(_: str, message: dict[str, str], limits: Limits) -> dict[str, object]:
        return call("greedy:load", message, Limits(limits.timeout_s, memory=2**29))

    monkeypatch.setattr("s2p_deploy.engines.load.call", call_greedy)
    with pytest.raises(MissingEnvironmentError, match=r"a trial run in a child process ran out of memory.*--batch"):
        load_engine(engine)
    assert not own_cache.exists() or not list(own_cache.iterdir())


@pytest.mark.slow
def test_a_native_crash_is_taken_by_the_trial(engine_of: EngineOf, tmp_path: Path, own_cache: Path) -> None:
    """OpenVINO 2026.4 dies on an input without an element type."""
    engine = engine_of("openvino", "f32", "int8")
    text = (engine.folder / "denoiser.xml").read_text().replace("element_type=", "elementOtype=", 1)
    spoiled = sealed_anew(engine, tmp_path / "copy", "denoiser.xml", text.encode())
    with pytest.raises(S2PError, match=r"a trial run in a child process (crashed|failed|ran out of memory)"):
        load_engine(spoiled)


def test_size_is_compared_before_memory_is_taken(engine: Engine, tmp_path: Path) -> None:
    shutil.copytree(engine.folder, tmp_path / "copy")
    os.truncate(tmp_path / "copy" / "denoiser.onnx.data", 1 << 40)
    with pytest.raises(IntegrityError, match="was changed"):
        verified_files(Engine.open(tmp_path / "copy"))


def test_a_graph_that_changes_while_it_is_built_is_found(graph_of: GraphOf, tmp_path: Path) -> None:
    """Between opening and preparing, which are two processes."""
    shutil.copytree(graph_of("fp32", "int8").folder, tmp_path / "graph")
    graph = ExportedGraph.open(tmp_path / "graph")
    data = tmp_path / "graph" / "denoiser.onnx.data"
    changed = bytearray(data.read_bytes())
    changed[-1] ^= 1
    data.write_bytes(changed)
    with pytest.raises(IntegrityError, match="was changed"):
        read_onnx(graph.folder, "denoiser.onnx", graph.manifest.files)


def test_a_graph_that_changes_after_it_was_hashed_is_found_when_it_is_used(graph_of: GraphOf, tmp_path: Path) -> None:
    shutil.copytree(graph_of("fp32", "int8").folder, tmp_path / "graph")
    graph = ExportedGraph.open(tmp_path / "graph")
    model = read_onnx(graph.folder, "denoiser.onnx", graph.manifest.files)
    tensors = [value.const_value for value in model.graph.initializers.values()]
    before = [tensor.tobytes() for tensor in tensors if tensor is not None]
    assert before == [tensor.tobytes() for tensor in tensors if tensor is not None]
    data = graph.folder / "denoiser.onnx.data"
    data.write_bytes(bytes(data.stat().st_size))  # the same file, other bytes
    with pytest.raises(IntegrityError, match="was changed"):
        [tensor.tobytes() for tensor in tensors if tensor is not None]


def test_a_build_leaves_two_copies_of_the_weights(graph_of: GraphOf, tmp_path: Path) -> None:
    """The graph's and the engine's: nothing that was made on the way stays."""
    build_engine(graph_of("fp32", "int8"), tmp_path / "engine", backend="onnxruntime")
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]
    large = [path.name for path in (tmp_path / "engine").iterdir() if path.stat().st_size > 5000]
    assert [name for name in large if name.startswith("denoiser")] == ["denoiser.onnx", "denoiser.onnx.data"]


def test_an_engine_that_cannot_be_bound_is_closed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_given: object) -> None:
        raise IntegrityError("the products of the text cannot be read")

    opened, still_open = watch_runners(monkeypatch)
    monkeypatch.setattr(Engine, "takes_text_projections", True)
    monkeypatch.setattr("s2p_deploy.engines.load.text_projections", fail)
    with pytest.raises(IntegrityError, match="cannot be read"):
        load_engine(engine)
    assert opened
    assert not still_open
