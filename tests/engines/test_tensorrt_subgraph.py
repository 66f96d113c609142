"""Subgraphs on a GPU are built for the sizes that they are called with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from s2p_deploy.engines import runner_for_subgraph
from s2p_deploy.engines.backend import call_in_child
from s2p_deploy.engines.tensorrt.subgraph import SubgraphRunner
from tests.engines.small_graph import small_inputs, small_model, small_scales
from tests.engines.stand_in_gpu import stand_in_gpus

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from s2p_deploy.child_process import Limits

MODULE = "s2p_deploy.engines.tensorrt.subgraph"


class Plans:
    """Stands in for building and opening plans: notes the shapes of each, and which are open."""

    def __init__(self, patch: pytest.MonkeyPatch, build: Callable[..., Any] | None = None) -> None:
        self.shapes: list[dict[str, Any]] = []
        self.open: list[int] = []
        self.devices: list[torch.device] = []
        self._build = build
        patch.setattr(f"{MODULE}.call_in_child", self._called)
        patch.setattr(f"{MODULE}.open_plan", self._opened)
        patch.setattr(f"{MODULE}.TensorRtRunner", lambda number, _bound: self._runner(number))

    def _called(self, function: str, message: dict[str, Any], limits: Limits) -> dict[str, Any]:
        assert onnx.load(message["onnx"]).graph.node  # with its weights beside it
        self.shapes.append(message["shapes"])
        Path(message["out"]).write_bytes(b"plan")
        return self._build(function, message, limits) if self._build else {}

    def _opened(self, _library: str, plan: bytes, device: torch.device) -> int:
        assert plan
        self.devices.append(device)
        self.open.append(len(self.shapes))
        return len(self.shapes)

    def _runner(self, number: int) -> SimpleNamespace:
        def infer(inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
            return {"noise_pred": np.full(len(inputs["timestep_index"]), number)}

        return SimpleNamespace(infer=infer, close=lambda: self.open.remove(number))


def open_model(dtype: str = "fp32") -> ir.Model:
    """The small graph as a block of one of open sizes: inner ones have no name."""
    model = ir.from_proto(small_model(dtype))
    for value in model.graph.inputs:
        if value.name == "sample":
            value.shape = ir.Shape(["batch", 4, None, "width"])
        if value.name == "act_scales":
            value.shape = ir.Shape(["timesteps", 2])
    return model


def inputs(batch: int, dtype: str = "fp32") -> dict[str, NDArray[Any]]:
    return small_inputs(batch, dtype=dtype) | {"act_scales": small_scales()}


def test_inner_sizes_are_the_arrays_and_only_the_batch_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = Plans(monkeypatch)
    with SubgraphRunner("tensorrt", open_model(), torch.device("cuda", 1)) as runner:
        for batch in (3, 1, 32):
            assert len(runner.infer(inputs(batch))["noise_pred"]) == batch
        assert plans.shapes[0]["sample"] == ((1, 4, 8, 8), (3, 4, 8, 8), (32, 4, 8, 8))
        assert plans.shapes[0]["act_scales"] == ((1, 2), (50, 2), (4096, 2))
        assert (len(plans.shapes), plans.devices) == (1, [torch.device("cuda", 1)])
    assert plans.open == []
    with pytest.raises(ValueError, match="closed"):
        runner.infer(inputs(1))


def test_other_inner_sizes_get_a_plan_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = Plans(monkeypatch)
    runner = SubgraphRunner("tensorrt", open_model(), torch.device("cuda", 0))
    wide = inputs(2) | {"sample": np.zeros((2, 4, 8, 16), np.float32)}
    assert [runner.infer(given)["noise_pred"][0] for given in (inputs(2), wide, inputs(2))] == [1, 2, 3]
    assert [shapes["sample"][2] for shapes in plans.shapes] == [(32, 4, 8, 8), (32, 4, 8, 16), (32, 4, 8, 8)]
    assert plans.open == [3]


def test_a_larger_batch_than_usual_is_allowed_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = Plans(monkeypatch)
    SubgraphRunner("tensorrt", open_model(), torch.device("cuda", 0)).infer(inputs(40))
    assert plans.shapes[0]["timestep_index"] == ((1,), (40,), (40,))


def test_a_subgraph_runs_on_the_current_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    plans, gpus = Plans(monkeypatch), stand_in_gpus(monkeypatch)
    gpus.current = 1
    with runner_for_subgraph(open_model("fp16"), "tensorrt_rtx") as runner:
        runner.infer(inputs(2, "fp16"))
    assert plans.devices == [torch.device("cuda", 1)]


@pytest.mark.trt
@pytest.mark.slow
def test_tensorrt_rtx_builds_a_block_of_open_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    plans = Plans(monkeypatch, call_in_child)
    SubgraphRunner("tensorrt_rtx", open_model("fp16"), torch.device("cuda", 0)).infer(inputs(2, "fp16"))
    assert len(plans.shapes) == 1
