"""Structure and numbers of attention as one operator, and that OpenVINO needs no such help."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from s2p_deploy.engines.onnx_files import write_onnx
from s2p_deploy.engines.passes.fused_attention import FusedAttention
from s2p_deploy.errors import IntegrityError
from tests.engines.passes.attention_graph import attention, inputs
from tests.engines.passes.reference_run import run_reference
from tests.engines.small_graph import read_back


def test_one_operator_gives_the_same_numbers() -> None:
    model = attention()
    expected = run_reference(ir.to_proto(model), inputs())["y"]
    assert FusedAttention()(model).modified
    (node,) = model.graph
    assert (node.domain, node.op_type) == ("com.microsoft", "MultiHeadAttention")
    assert node.attributes.get_int("num_heads") == 2
    assert node.outputs[0].name == "y"
    assert not model.graph.initializers
    np.testing.assert_allclose(run_reference(ir.to_proto(model), inputs())["y"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        ("<axis: int = -1>", "<axis: int = 2>"),
        ("ks = Mul(kt, root)", "ks = Mul(kt, kt)"),
        ("vh = Transpose <perm: ints = [0, 2, 1, 3]>", "vh = Transpose <perm: ints = [0, 2, 3, 1]>"),
        ("y = Reshape(turned, flat)", "w = Reshape(turned, flat)\n    z = Neg(shares)\n    y = Add(w, z)"),
    ],
)
def test_what_only_looks_like_it_stays(change: tuple[str, str]) -> None:
    model = attention(change=change)
    count = len(list(model.graph))
    assert not FusedAttention()(model).modified
    assert len(list(model.graph)) == count


def test_the_guard_of_files_takes_this_operator_and_no_other(tmp_path: Path) -> None:
    model = attention()
    FusedAttention()(model)
    write_onnx(model, tmp_path / "fused.onnx")
    assert [node.op_type for node in read_back(tmp_path / "fused.onnx").graph] == ["MultiHeadAttention"]
    (node,) = model.graph
    node.op_type = "BiasGelu"
    write_onnx(model, tmp_path / "other.onnx")
    with pytest.raises(IntegrityError, match="foreign operator"):
        read_back(tmp_path / "other.onnx")


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_openvino_fuses_the_exported_form_by_itself(precision: str) -> None:
    """Products and softmax disappear in one compiled subgraph; if they come back, attention needs a pass here too."""
    import openvino

    model = openvino.Core().read_model(model=ir.to_proto(attention()).SerializeToString())
    model.reshape({name: list(value.shape) for name, value in inputs().items()})
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    layers = [str(op.get_rt_info()["layerType"].astype(str)) for op in compiled.get_runtime_model().get_ordered_ops()]
    assert "Subgraph" in layers
    assert not {"MatMul", "Softmax", "FullyConnected"} & set(layers)
