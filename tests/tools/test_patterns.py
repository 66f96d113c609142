"""The patterns' graphs compute what it expects of them, and tell a right engine from a wrong one."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

from s2p_deploy.engines.backend import backend_by_name
from s2p_deploy.engines.support import Pattern
from s2p_deploy.records import Execution
from tools.check_backends import (
    LOWERINGS,
    OPS,
    OUTPUT,
    WEIGHTS,
    Case,
    all_patterns,
    attempt,
    case_of,
    largest_error,
)

RUNTIME = [lowering for lowering in LOWERINGS if lowering not in {"static", "float"}]

REFERENCE = Execution(optimization="reference", provider="cpu")


def computed(case: Case, trial: int) -> np.ndarray:
    """By ONNX Runtime, without optimization."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(case.model.SerializeToString(), options, ["CPUExecutionProvider"])
    (found,) = session.run([OUTPUT], case.trials[trial].inputs)
    return np.asarray(found, np.float64)


def test_the_matrix_is_whole() -> None:
    patterns = all_patterns()
    assert len(set(patterns)) == len(patterns) == len(LOWERINGS) * len(OPS) * len(WEIGHTS)
    assert {p.activations for p in patterns if p.lowering == "float"} == {"none"}
    assert {p.activations for p in patterns if p.lowering != "float"} == {"int8"}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_a_pattern_computes_what_is_expected(lowering: str, op: str, weights: str) -> None:
    case = case_of(Pattern(lowering, op, weights, "int8"), "fp32")
    for trial in (0, 1):
        np.testing.assert_allclose(computed(case, trial), case.trials[trial].expected, atol=1e-4)


@pytest.mark.parametrize("lowering", RUNTIME)
def test_what_the_other_timestep_gives_is_far_off(lowering: str) -> None:
    """Or an engine that ignores the scale of the timestep would pass."""
    first, second = case_of(Pattern(lowering, "matmul", "int8", "int8"), "fp16").trials
    assert np.abs(first.expected - second.expected).max() > 0.2 * np.abs(first.expected).max()


def test_a_graph_that_computes_something_else_is_wrong() -> None:
    backend, pattern = backend_by_name("onnxruntime"), Pattern("rescale", "matmul", "int8", "int8")
    case = case_of(pattern, "fp32")
    assert largest_error(backend, case, REFERENCE) < 1e-5
    (table,) = (n for n in case.model.graph.node if n.op_type == "Gather" and n.input[0] == "act_scales")
    table.input[1] = "first_index"
    rows = onnx.numpy_helper.from_array(np.zeros(2, np.int64), "first_index")
    case.model.graph.initializer.append(rows)
    assert largest_error(backend, case, REFERENCE) > 0.2


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_an_attempt_builds_runs_and_reports_the_compute_type(dtype: str) -> None:
    outcome = attempt(backend_by_name("onnxruntime"), Pattern("static", "matmul", "int8", "int8"), dtype, REFERENCE)
    assert (outcome.verdict, outcome.compute) == ("builds", "fp32" if dtype == "fp32" else outcome.compute)
