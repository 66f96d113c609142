"""Bound inputs get other values while an engine runs, as timesteps that were not named need."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime
import pytest
import torch

from s2p_deploy.engines import backend_by_name
from s2p_deploy.engines.onnxruntime.runners import DeviceRunner, OnnxRuntimeRunner
from s2p_deploy.engines.runner import BOUND, RebindingRunner, Runner
from s2p_deploy.engines.tensorrt.plan import open_plan
from s2p_deploy.engines.tensorrt.runner import TensorRtRunner
from s2p_deploy.records.artifacts import verified_files
from tests.engines.small_graph import small_inputs, small_model, small_scales
from tests.engines.stand_in_gpu import stand_in_gpus, stand_in_library

if TYPE_CHECKING:
    from tests.engines.conftest import EngineOf

OTHER = small_scales()[::-1] * np.float32(1.5)


def session_runner(scales: np.ndarray) -> Runner:
    return OnnxRuntimeRunner(opened_session(), {BOUND: scales})


def device_runner(scales: np.ndarray) -> Runner:
    return DeviceRunner(opened_session(), {BOUND: scales}, None)


def opened_session() -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(small_model().SerializeToString(), options)


@pytest.mark.parametrize("kind", [session_runner, device_runner])
def test_onnxruntime_computes_with_what_was_bound_last(kind: object) -> None:
    check_rebinding(kind)


def test_openvino_computes_with_what_was_bound_last_at_every_size(engine_of: EngineOf) -> None:
    """Of fixed sizes too, which it compiles once each."""
    engine, backend = engine_of("openvino", "f32", "int8"), backend_by_name("openvino")

    def loaded(scales: np.ndarray) -> Runner:
        return backend.load(engine, verified_files(engine), {BOUND: scales})

    check_rebinding(loaded)


def check_rebinding(opened: object) -> None:
    assert callable(opened)
    runner, fresh = opened(small_scales()), opened(OTHER)
    assert isinstance(runner, RebindingRunner)
    # copied: on the CPU the device runner's buffers are the host's
    before = [runner.infer(small_inputs(batch))["noise_pred"].copy() for batch in (1, 2, 3)]
    runner.rebind(BOUND, OTHER)
    for batch, old in zip((1, 2, 3), before, strict=True):
        found = runner.infer(small_inputs(batch))["noise_pred"]
        np.testing.assert_array_equal(found, fresh.infer(small_inputs(batch))["noise_pred"])
        assert not np.array_equal(found, old)
    runner.rebind(BOUND, small_scales())
    np.testing.assert_array_equal(runner.infer(small_inputs(2))["noise_pred"], before[1])


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
def test_tensorrt_writes_to_the_buffer_that_is_bound(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gpus = stand_in_gpus(monkeypatch)
    monkeypatch.setitem(sys.modules, name, stand_in_library(name, gpus))
    scales = np.ones((2, 3), np.float16)
    runner = TensorRtRunner(open_plan(name, b"plan", torch.device("cuda", 1)), {BOUND: scales})
    before = runner._buffers[BOUND].data_ptr()
    runner.rebind(BOUND, 2 * scales)
    runner.rebind("nothing that the plan reads", scales)
    assert runner._buffers[BOUND].data_ptr() == before  # contexts and captured graphs know its address
    np.testing.assert_array_equal(runner._front(BOUND, (2, 3)).numpy(), 2 * scales)
    assert gpus.current == 0
    runner.close()
