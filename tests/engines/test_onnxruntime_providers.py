"""ONNX Runtime's execution providers for NVIDIA GPUs: chosen by name, refused by name where they cannot run."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from s2p_deploy.engines import BuildOptions, ShapeProfile, backend_by_name, build_engine, load_engine
from s2p_deploy.engines.onnxruntime.providers import (
    PROVIDERS,
    gpu_session,
    graph_traits,
    provider_options,
    unavailable,
)
from s2p_deploy.engines.onnxruntime.runners import DeviceRunner, OnnxRuntimeRunner
from s2p_deploy.engines.runner import TensorRunner
from s2p_deploy.errors import MissingEnvironmentError
from s2p_deploy.records import Execution, TensorSpec
from s2p_deploy.records.artifacts import verified_files
from tests.engines.conftest import EngineOf, GraphOf
from tests.engines.small_graph import on_the_gpu, small_inputs, small_model, small_scales
from tests.engines.stand_in_gpu import stand_in_gpus

INPUTS = (
    TensorSpec("sample", "float16", ("batch", 4, 8, 8)),
    TensorSpec("timestep_index", "int64", ("batch",)),
    TensorSpec("act_scales", "float32", ("timesteps", 2)),
)
TRAITS = graph_traits(INPUTS, ShapeProfile(1, 2, 8), quantized=True, digest="d")


def open_session() -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(small_model().SerializeToString(), providers=["CPUExecutionProvider"])


def test_tensorrts_options_name_precisions_shapes_and_caches() -> None:
    options = provider_options("tensorrt", 0, TRAITS, "/cache")
    assert options["trt_profile_min_shapes"] == "sample:1x4x8x8,timestep_index:1,act_scales:1x2"
    assert options["trt_profile_opt_shapes"] == "sample:2x4x8x8,timestep_index:2,act_scales:1000x2"
    assert options["trt_profile_max_shapes"] == "sample:8x4x8x8,timestep_index:8,act_scales:4096x2"
    assert (options["trt_fp16_enable"], options["trt_int8_enable"]) == ("1", "1")
    assert options["trt_engine_cache_path"] == options["trt_timing_cache_path"] == "/cache"
    assert not any("calibration" in name for name in options)


def test_precisions_follow_the_graph() -> None:
    floating = provider_options("tensorrt", 0, replace(TRAITS, fp16=False, quantized=False), "/cache")
    assert (floating["trt_fp16_enable"], floating["trt_int8_enable"]) == ("0", "0")


def test_rtx_has_shapes_graphs_and_a_runtime_cache() -> None:
    options = provider_options("nv_tensorrt_rtx", 0, TRAITS, "/cache")
    assert options["nv_profile_max_shapes"] == "sample:8x4x8x8,timestep_index:8,act_scales:4096x2"
    assert (options["enable_cuda_graph"], options["nv_runtime_cache_path"]) == ("1", "/cache")


def test_what_cannot_run_here_says_what_to_do(graph_of: GraphOf, tmp_path: Path) -> None:
    found = backend_by_name("onnxruntime").capabilities()
    assert set(found.providers) | set(found.unavailable) == {"cpu", *PROVIDERS}
    assert (found.providers[0], found.optimizations) == ("cpu", ("reference", "full"))
    for provider, advice in found.unavailable.items():
        with pytest.raises(MissingEnvironmentError) as caught:
            build_engine(
                graph_of("fp16", "int8"),
                tmp_path / provider,
                backend="onnxruntime",
                options=BuildOptions(provider=provider),
            )
        assert advice in str(caught.value)
        assert caught.value.exit_code == 4


def test_a_gpu_engine_whose_provider_was_changed_does_not_run_on_the_cpu(engine_of: EngineOf) -> None:
    engine = engine_of("onnxruntime", "reference", "int8")
    gpu = {"device": "CUDA GPU", "provider": PROVIDERS["cuda"].name}
    with pytest.raises(MissingEnvironmentError, match="needs device CUDA GPU, here it is cpu"):
        load_engine(replace(engine, environment=engine.environment | gpu))


@pytest.mark.parametrize("provider", list(PROVIDERS))
def test_a_gpu_engine_is_refused_where_its_provider_is_missing(engine_of: EngineOf, provider: str) -> None:
    lacking = unavailable()
    if provider not in lacking:
        pytest.skip("this machine has the provider")
    engine = engine_of("onnxruntime", "reference", "int8")
    needed = engine.environment | {"provider": PROVIDERS[provider].name}
    needed["device"] = backend_by_name("onnxruntime").environment(Execution(provider=provider))["device"]
    with pytest.raises(MissingEnvironmentError) as caught:
        load_engine(replace(engine, provider=provider, environment=needed))
    assert f"needs provider {PROVIDERS[provider].name}, here it is missing" in str(caught.value)
    assert lacking[provider] in str(caught.value)


def test_an_engine_on_the_cpu_takes_no_tensors(engine_of: EngineOf) -> None:
    with load_engine(engine_of("onnxruntime", "reference", "int8")) as runner:
        assert not isinstance(runner, TensorRunner)


def test_bound_buffers_compute_what_a_plain_run_does() -> None:
    """On the CPU: the same calls that bind buffers on a GPU."""
    bound = {"act_scales": small_scales()}
    plain, device = OnnxRuntimeRunner(open_session(), bound), DeviceRunner(open_session(), bound, None)
    for batch, seed in ((1, 1), (3, 2), (3, 3), (1, 4)):  # again a size that was bound before
        inputs = small_inputs(batch, seed)
        expected = plain.infer(inputs)["noise_pred"]
        assert np.array_equal(device.infer(inputs)["noise_pred"], expected)
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        assert np.array_equal(device.infer_tensors(tensors)["noise_pred"].numpy(), expected)
    device.close()
    with pytest.raises(ValueError, match="closed"):
        device.infer(small_inputs(1))


def test_old_sizes_make_room() -> None:
    device = DeviceRunner(open_session(), {"act_scales": small_scales()}, None)
    for batch in range(1, 11):
        assert len(device.infer(small_inputs(batch))["noise_pred"]) == batch
    assert len(device.infer(small_inputs(1))["noise_pred"]) == 1


@pytest.mark.parametrize("provider", list(PROVIDERS))
def test_every_option_names_the_gpu_and_large_weights_stay_out_of_the_model(provider: str) -> None:
    for traits in (None, TRAITS):
        options = provider_options(provider, 1, traits, "/cache")
        assert options["device_id"] == "1"
        outside = {"trt_load_user_initializer", "nv_use_external_data_initializer"} & set(options)
        assert len(outside) == (0 if provider == "cuda" else 1)  # CUDA's reads tensors one by one
        assert all(options[name] == "1" for name in outside)


class OpenedSessions:
    """Stands in for ONNX Runtime's GPU package: notes what sessions were opened with."""

    def __init__(self, patch: pytest.MonkeyPatch, *providers: str) -> None:
        self.asked: list[tuple[str, dict[str, str]]] = []
        patch.setattr(onnxruntime, "get_available_providers", lambda: [*providers, "CPUExecutionProvider"])
        patch.setattr(onnxruntime, "preload_dlls", lambda: None)
        patch.setattr(onnxruntime, "InferenceSession", self.open)

    def open(
        self,
        _model: object,
        options: Any,  # noqa: ANN401 - as ONNX Runtime's
        providers: list[Any] | None = None,
    ) -> SimpleNamespace:
        self.asked += [] if providers is None else [given for given in providers if isinstance(given, tuple)]
        first = options.first if providers is None else providers[0][0]
        return SimpleNamespace(get_providers=lambda: [first])


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_session_is_opened_on_the_gpu_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, provider: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sessions = OpenedSessions(monkeypatch, *(PROVIDERS[name].name for name in ("cuda", "tensorrt")))
    gpu_session(b"model", onnxruntime.SessionOptions(), provider, TRAITS, 1)
    assert [name for name, _ in sessions.asked] == [PROVIDERS[name].name for name in dict.fromkeys((provider, "cuda"))]
    assert [options["device_id"] for _, options in sessions.asked] == ["1"] * len(sessions.asked)


@pytest.mark.parametrize("order", [("0", "1"), ("1", "0")])
def test_the_plugin_takes_the_device_that_is_cudas_of_that_index(
    monkeypatch: pytest.MonkeyPatch, order: tuple[str, str]
) -> None:
    """It lists its devices in an order of its own."""
    name = PROVIDERS["nv_tensorrt_rtx"].name
    OpenedSessions(monkeypatch)
    devices = [SimpleNamespace(ep_name=name, ep_options={"device_id": index}) for index in order]
    monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: devices)
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", SimpleNamespace(get_ep_name=lambda: name))
    added: list[tuple[list[Any], dict[str, str]]] = []
    options = SimpleNamespace(first=name, add_provider_for_devices=lambda on, chosen: added.append((on, chosen)))
    gpu_session(b"model", options, "nv_tensorrt_rtx", None, 1)  # type: ignore[arg-type]
    ((taken,), chosen) = added[0]
    assert (taken.ep_options["device_id"], chosen["device_id"]) == ("1", "1")
    with pytest.raises(MissingEnvironmentError, match="does not run on GPU 2"):
        gpu_session(b"model", options, "nv_tensorrt_rtx", None, 2)  # type: ignore[arg-type]


def test_an_engine_is_opened_and_its_buffers_lie_on_the_gpu_that_was_asked_for(
    engine_of: EngineOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    stand_in_gpus(monkeypatch)
    sessions = OpenedSessions(monkeypatch, PROVIDERS["cuda"].name)
    places: list[tuple[object, ...]] = []
    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", lambda _value, *place: places.append(place))
    engine = replace(engine_of("onnxruntime", "reference", "int8"), provider="cuda")
    files = verified_files(engine)
    backend_by_name("onnxruntime").load(engine, files, {"act_scales": small_scales()}, "cuda:1")
    assert [options["device_id"] for _, options in sessions.asked] == ["1"]
    assert places == [("cuda", 1)]


@pytest.mark.gpu
@pytest.mark.parametrize("provider", list(PROVIDERS))
def test_a_provider_computes_what_the_reference_does(graph_of: GraphOf, tmp_path: Path, provider: str) -> None:
    lacking = unavailable()
    if provider in lacking:
        pytest.skip(lacking[provider])
    graph, options = graph_of("fp16", "int8"), BuildOptions(provider=provider, profile=ShapeProfile(1, 2, 8))
    built = build_engine(graph, tmp_path / provider, backend="onnxruntime", options=options)
    reference = build_engine(graph, tmp_path / "reference", backend="onnxruntime")
    with load_engine(built, graph) as candidate, load_engine(reference, graph) as expected:
        for batch in (1, 3, 8, 3):
            inputs = small_inputs(batch, dtype="fp16")
            a, b = (r.infer(inputs)["noise_pred"].astype(np.float64) for r in (candidate, expected))
            assert 10 * np.log10((b**2).mean() / ((a - b) ** 2).mean()) > 25
            assert isinstance(candidate, TensorRunner)
            found = candidate.infer_tensors(on_the_gpu(inputs))["noise_pred"]
            assert np.array_equal(found.cpu().numpy(), a.astype(np.float16))
