"""Text encoders and autoencoder as ONNX, in floating point, one network in memory at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir
import torch

from s2p_deploy.export.passes.fill_weights import FillWeights
from s2p_deploy.export.passes.fold_constants import FoldConstants
from s2p_deploy.export.passes.readable_names import ReadableNames
from s2p_deploy.export.passes.strip_metadata import StripMetadata
from s2p_deploy.export.scopes import NAME_SCOPES
from s2p_deploy.export.tracing import OPSET, quiet_exporter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from s2p_deploy.families.components import ComponentNetwork

_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"  # what torch notes where it does not know the module


def component_model(component: ComponentNetwork, name: str) -> ir.Model:
    """A network as ONNX, float32; its weights are those in memory, not copies of them.

    Args:
        component: what to trace.
        name: the graph's.
    """
    with quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            component.network,
            (component.example,),
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            input_names=[component.input],
            output_names=list(component.outputs),
            dynamic_shapes=(component.open_sizes,),
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    model = program.model
    weights = {key: value.const_value for key, value in model.graph.initializers.items()}

    def read(key: str) -> NDArray[np.float32]:
        tensor = weights[key]
        assert tensor is not None, "traced with its data"
        return tensor.numpy()

    for node in model.graph:
        if _NO_MODULE in node.metadata_props.get(NAME_SCOPES, ""):
            del node.metadata_props[NAME_SCOPES]  # the passes give it that of its first reader
    for transformation in (FoldConstants(), FillWeights(read, ir.DataType.FLOAT), ReadableNames(), StripMetadata()):
        transformation(model)
    model.graph.name = name
    return model
