"""ONNX Runtime with optimization off: every quantizer runs as the graph says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnxruntime

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import onnx


def run_reference(model: onnx.ModelProto, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs by name; ``values`` may hold more than the model takes."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    feeds = {item.name: values[item.name] for item in session.get_inputs()}
    return dict(zip([item.name for item in session.get_outputs()], session.run(None, feeds), strict=True))
