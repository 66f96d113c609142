"""Structure and numbers of an attention whose queries alone are scaled."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from s2p_deploy.engines.passes.fused_attention import FusedAttention
from s2p_deploy.engines.passes.padded_heads import PaddedHeads
from s2p_deploy.engines.passes.scaled_queries import ScaledQueries
from tests.engines.passes.attention_graph import attention, inputs
from tests.engines.passes.reference_run import run_reference


def test_keys_are_read_as_they_are_and_the_numbers_stay() -> None:
    model = attention()
    expected = run_reference(ir.to_proto(model), inputs())["y"]
    assert ScaledQueries()(model).modified
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("Mul") == 1
    assert "root" not in model.graph.initializers
    (scores,) = (node for node in model.graph if node.outputs[0].name == "scores")
    scaled, keys = (operand.producer() for operand in scores.inputs)
    assert [node.op_type for node in (scaled, keys)] == ["Mul", "Transpose"]
    assert scaled.inputs[1].const_value.numpy() == pytest.approx(0.49)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    np.testing.assert_allclose(run_reference(proto, inputs())["y"], expected, rtol=1e-5, atol=1e-6)


def test_a_second_pass_finds_nothing_to_do() -> None:
    model = attention()
    ScaledQueries()(model)
    assert not ScaledQueries()(model).modified


@pytest.mark.parametrize(
    "change",
    [
        ("ks = Mul(kt, root)", "ks = Neg(kt)"),
        ("ks = Mul(kt, root)", "ks = Mul(kt, kt)"),
        ("shares = Softmax <axis: int = -1> (scores)", "shares = Relu(scores)"),
        ("y = Reshape(turned, flat)", "w = Reshape(turned, flat)\n    z = Neg(ks)\n    y = Add(w, z)"),
    ],
)
def test_what_only_looks_like_it_stays(change: tuple[str, str]) -> None:
    assert not ScaledQueries()(attention(change=change)).modified


@pytest.mark.parametrize("first", [PaddedHeads, FusedAttention])
def test_other_passes_know_such_attention_too(first: type[ir.passes.InPlacePass]) -> None:
    model = attention(512)
    expected = run_reference(ir.to_proto(model), inputs(512))["y"]
    ScaledQueries()(model)
    assert first()(model).modified
    np.testing.assert_allclose(run_reference(ir.to_proto(model), inputs(512))["y"], expected, rtol=1e-5, atol=1e-6)
