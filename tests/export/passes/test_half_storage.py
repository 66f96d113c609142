from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
from graph_text import graph_from_text

from s2p_deploy.export.passes.half_storage import HalfStorage

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GRAPH = """
g (
    float[rows,32] given, float[32,32] weight, float[32] bias, int64[1024] whole
) => (float[rows,32] out, int64[1024] same) {
    a = MatMul(given, weight)
    b = MatMul(a, weight)
    out = Add(b, bias)
    same = Identity(whole)
}
"""
RANDOM = np.random.default_rng(0)
STORED = {
    "weight": RANDOM.standard_normal((32, 32)).astype(np.float32),
    "bias": RANDOM.standard_normal(32).astype(np.float32),
    "whole": np.arange(1024),
}


def halved() -> ir.Model:
    model = graph_from_text(GRAPH, STORED)
    HalfStorage()(model)
    return model


def test_large_matrices_are_stored_in_half_and_nothing_else_is() -> None:
    graph = halved().graph
    types = {name: value.dtype for name, value in graph.initializers.items()}
    assert types == {
        "weight/half": ir.DataType.FLOAT16,
        "bias": ir.DataType.FLOAT,
        "whole": ir.DataType.INT64,
    }
    assert [node.op_type for node in graph].count("Cast") == 1, "one for both readers"
    stored = graph.initializers["weight/half"].const_value
    assert stored is not None
    np.testing.assert_array_equal(stored.numpy(), STORED["weight"].astype(np.float16))


def test_arithmetic_stays_in_full_precision(run_onnx: Callable) -> None:
    model = ir.to_proto(halved())
    onnx.checker.check_model(model, full_check=True)
    given = RANDOM.standard_normal((3, 32)).astype(np.float32)
    rounded = STORED["weight"].astype(np.float16).astype(np.float32)
    found = run_onnx(model, {"given": given})["out"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, given @ rounded @ rounded + STORED["bias"], rtol=1e-5, atol=1e-5)
    half = (given.astype(np.float16) @ rounded.astype(np.float16)).astype(np.float32) @ rounded + STORED["bias"]
    assert np.abs(found - half).max() > 1e-3, "half arithmetic would be seen"


def test_the_file_holds_half_as_much(tmp_path: Path) -> None:
    ir.save(halved(), tmp_path / "half.onnx")
    ir.save(graph_from_text(GRAPH, STORED), tmp_path / "full.onnx")
    saved = (tmp_path / "full.onnx").stat().st_size - (tmp_path / "half.onnx").stat().st_size
    assert saved > 0.9 * STORED["weight"].nbytes / 2


def test_a_second_time_changes_nothing() -> None:
    model = halved()
    assert not HalfStorage()(model).modified
    assert len(model.graph.initializers) == 3
