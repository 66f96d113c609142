from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from graph_text import graph_from_text

from s2p_deploy.export.passes.weight_quantizers import WeightQuantizers
from s2p_deploy.export.regions import SiteNode
from s2p_deploy.records import SitePlan

if TYPE_CHECKING:
    from collections.abc import Callable

GRAPH = """
g (float[1,1,1,2] sample, float[2,1,1,1] conv__weight, float[2,2] fc__weight) => (float[1,2,1,2] out) {
    a = Conv(sample, conv__weight)
    out = MatMul(a, fc__weight)
}
"""


def test_both_kinds_of_weights_come_out_on_their_grids(run_onnx: Callable) -> None:
    conv = np.asarray([0.24, -3.0], np.float32).reshape(2, 1, 1, 1)
    linear = np.asarray([[1.0, 2.2], [-9.0, 30.0]], np.float32)  # [out, in]
    weights = {"network.conv.weight": conv, "network.fc.weight": linear}
    scales = {
        "conv": np.asarray([0.1, 1.0], np.float32).reshape(2, 1, 1, 1),
        "fc": np.asarray([[1.0], [2.0]], np.float32),
    }
    model = graph_from_text(GRAPH, {"conv__weight": None, "fc__weight": None})
    ops = {"conv": ("conv", "int8"), "fc": ("linear", "int4")}
    sites = tuple(
        SiteNode(SitePlan(name, op, kind, None, ""), node, None)
        for (name, (op, kind)), node in zip(ops.items(), model.graph, strict=True)
    )
    WeightQuantizers(sites, weights.__getitem__, scales, ir.DataType.FLOAT)(model)
    assert set(model.graph.initializers) == {
        f"{site}/weight_quantizer/{part}" for site in ("conv", "fc") for part in ("codes", "scale")
    }
    found = run_onnx(ir.to_proto(model), {"sample": np.asarray([[[[1.0, 10.0]]]], np.float32)})["out"]
    # conv: 0.2 and -3; linear: rows of [out, in] are [1, 2] and [2 * -4.5 -> -8 (half to even of -4.5 is -4), 2 * 7]
    signal = np.asarray([[1.0, 10.0]]) * np.asarray([[0.2], [-3.0]])
    np.testing.assert_allclose(found[0, :, 0], signal @ np.asarray([[1.0, 2.0], [-8.0, 14.0]]).T, rtol=1e-6)
