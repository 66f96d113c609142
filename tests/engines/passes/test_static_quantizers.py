"""Structure and numbers of the lowering ``static``."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from s2p_deploy.engines.passes.static_quantizers import StaticQuantizers
from tests.engines.passes.reference_run import run_reference
from tests.engines.small_graph import REFERENCE_SCALE, small_inputs, small_model, small_scales

CODES = ("conv/codes", "to_q/codes")


def constant_scales() -> np.ndarray:
    """Every row has the reference_scale: what ``static`` builds in."""
    return np.full_like(small_scales(), np.float32(REFERENCE_SCALE))


@pytest.mark.parametrize("chosen", [CODES, CODES[:1], CODES[1:]])
def test_results_are_those_of_rescale_with_the_constant_scale(chosen: tuple[str, ...]) -> None:
    scales = small_scales()
    for column, name in enumerate(CODES):
        if name in chosen:
            scales[:, column] = REFERENCE_SCALE
    given = small_inputs() | {"act_scales": scales}
    model = ir.from_proto(small_model())
    assert StaticQuantizers(chosen)(model).modified
    found = run_reference(ir.to_proto(model), given)["noise_pred"]
    np.testing.assert_allclose(found, run_reference(small_model(), given)["noise_pred"], rtol=1e-5, atol=1e-6)


def test_no_multiplication_is_left_and_the_input_goes() -> None:
    model = ir.from_proto(small_model())
    StaticQuantizers(CODES)(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert [value.name for value in model.graph.inputs] == ["sample", "timestep_index", "encoder_hidden_states"]
    kinds = Counter(node.op_type for node in model.graph)
    assert kinds["Mul"] == 1  # SiLU's
    assert not {"Gather", "Split", "Div"} & set(kinds)
    nodes = {str(node.name): node for node in model.graph}
    for layer in ("conv", "to_q"):
        kinds = ("QuantizeLinear", "DequantizeLinear")
        quantize, dequantize = (nodes[f"{layer}/input_quantizer/{kind}"] for kind in kinds)
        assert quantize.inputs[1] is dequantize.inputs[1]
        assert quantize.inputs[1].is_initializer()


def test_a_convolution_takes_its_bias_back_and_keeps_its_name() -> None:
    model = ir.from_proto(small_model())
    StaticQuantizers(CODES)(model)
    conv = next(node for node in model.graph if node.name == "conv/Conv")
    assert conv.inputs[2].name == "conv/bias"
    assert conv.inputs[2].shape.numpy() == (32,)
    assert conv.outputs[0].name == "conv/output"


def test_one_point_of_two_keeps_the_input() -> None:
    model = ir.from_proto(small_model())
    StaticQuantizers(CODES[:1])(model)
    assert "act_scales" in [value.name for value in model.graph.inputs]
    assert "to_q/rescaled" in [node.name for node in model.graph]
    assert "conv/rescaled" not in [node.name for node in model.graph]


def test_points_that_a_part_lacks_are_passed_over() -> None:
    assert not StaticQuantizers(["elsewhere/codes"])(ir.from_proto(small_model())).modified


def test_another_form_is_refused() -> None:
    model = ir.from_proto(small_model())
    StaticQuantizers(CODES[:1])(model)
    with pytest.raises(ir.passes.PreconditionError, match="conv/codes is no activation quantizer in the form rescale"):
        StaticQuantizers(CODES[:1])(model)
