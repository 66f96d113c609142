"""Small ONNX graphs from text, with stored tensors: the text form has no initializers without values and no dots."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np


def graph_from_text(body: str, stored: Mapping[str, np.ndarray | None]) -> ir.Model:
    """A model from ``name (inputs) => (outputs) { nodes }``.

    Inputs named in ``stored`` become initializers with the given data (None: without data); ``__`` in any value's name
    becomes a dot.
    """
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]>\n{body}')
    graph = model.graph
    for value in list(graph.inputs):
        if value.name in stored:
            array = stored[value.name]
            graph.inputs.remove(value)
            value.name = value.name.replace("__", ".")
            value.const_value = None if array is None else ir.Tensor(array, name=value.name)
            graph.initializers.add(value)
    return model
