from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest

from s2p_deploy.export import tracing
from s2p_deploy.export.tracing import TracedDenoiser
from s2p_deploy.families import Block, Tap
from s2p_deploy.records import TimestepTable, TimeTable, TransformSpec
from tests.remembered_traces import RememberedTraces
from tests.shared_folder import SharedFolder

if TYPE_CHECKING:
    from pathlib import Path

TABLE = TimeTable(np.zeros((10, 4), np.float32), {"block": (0, 4)})
STEPS = TimestepTable("DDIMScheduler", {}, 2, (0.0, 1.0), np.linspace(0, 1, 10))
ASKED = {"config": {"a": 1}, "time": TABLE, "transforms": TransformSpec(), "tokens": 6, "dtype": "float32"}
BLOCKS = (Block("mid", ("a", "b"), (Tap("a", "input"),), (Tap("b", "output"),)),)


def small_model(name: str) -> ir.Model:
    """Adds a parameter without data to its input."""
    value = ir.Value(name="x", shape=ir.Shape(["batch", 4]), type=ir.TensorType(ir.DataType.FLOAT))
    weight = ir.Value(name="weight", shape=ir.Shape([4]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Add", [value, weight], metadata_props={"scopes": "['network', 'add']"})
    graph = ir.Graph([value], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 21}, name=name)
    return ir.Model(graph, ir_version=10)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was traced, by a tracer that takes no time."""
    seen: list[Any] = []

    def trace(config: dict[str, Any], *rest: object, **options: object) -> TracedDenoiser:
        seen.append((config, *rest, options))
        return TracedDenoiser(small_model(f"trace {len(seen)}"), BLOCKS)

    monkeypatch.setattr(tracing, "trace_denoiser", trace)
    return seen


@pytest.fixture
def traces(tmp_path: Path) -> RememberedTraces:
    return RememberedTraces(SharedFolder(tmp_path))


def trace(traces: RememberedTraces, **changed: object) -> TracedDenoiser:
    asked: dict[str, Any] = ASKED | changed
    return traces(asked.pop("config"), asked.pop("time"), asked.pop("transforms"), **asked)


def ask(traces: RememberedTraces, **changed: object) -> str:
    graph = trace(traces, **changed).model.graph
    name = str(graph.name)
    graph.name = "spoiled by its reader"
    return name


def test_the_same_arguments_are_traced_once_and_copied(calls: list[Any], traces: RememberedTraces) -> None:
    other_weights = dataclasses.replace(TABLE, projections=TABLE.projections + 1)
    again = RememberedTraces(traces.shared)  # as in another process
    assert [ask(traces), ask(traces), ask(again, time=other_weights)] == ["trace 1"] * 3
    assert len(calls) == 1


@pytest.mark.usefixtures("calls")
def test_a_trace_comes_back_as_it_was(traces: RememberedTraces) -> None:
    """tests/export/test_exporter.py holds a remembered export against one that was traced anew."""
    for _ in range(2):
        found = trace(traces)
        assert found.blocks == BLOCKS
        graph = found.model.graph
        assert graph.inputs[0].shape == ir.Shape(["batch", 4])
        assert graph.node(0).metadata_props == {"scopes": "['network', 'add']"}
        weight = graph.initializers["weight"]
        assert (weight.shape, weight.dtype, weight.const_value) == (ir.Shape([4]), ir.DataType.FLOAT, None)


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize(
    "changed",
    [
        {"config": {"a": 2}},
        {"time": TimeTable(np.zeros((11, 4), np.float32), TABLE.slices)},
        {"time": TimeTable(TABLE.projections, {"other": (0, 4)})},
        {"time": STEPS},
        {"transforms": TransformSpec(split={"a": 2})},
        {"tokens": 7},
        {"dtype": "float16"},
        {"sizes": "dynamic"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_any_other_argument_is_traced_by_itself(traces: RememberedTraces, changed: dict[str, Any]) -> None:
    assert [ask(traces), ask(traces, **changed), ask(traces)] == ["trace 1", "trace 2", "trace 1"]


@pytest.mark.usefixtures("calls")
def test_tables_of_timesteps_are_told_apart_by_their_values(traces: RememberedTraces) -> None:
    moved = dataclasses.replace(STEPS, angle=STEPS.angle * np.where(np.arange(10) == 5, 0.5, 1))
    assert [ask(traces, time=STEPS), ask(traces, time=moved)] == ["trace 1", "trace 2"]
