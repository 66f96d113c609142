"""What TensorRT's engine inspector says of the layers of a plan. It needs a GPU to open the plan.

TensorRT 10 names a tensor's type under ``Format/Datatype``, TensorRT 11 apart from its format; both are read.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    from s2p_deploy.engines.profile_shapes import Shapes

_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]\x1e]+)\]")
_PRODUCT = re.compile(r"/(?:Conv|MatMul|Gemm)(?:_\d+)?$")
_TYPE_KEYS = ("DataType", "Datatype", "Format/Datatype", "Format")
# the first that matches: "BFloat16" holds "Float16", and that "Float"
_TYPES = (
    (re.compile(r"bf16|bfloat16", re.IGNORECASE), "bf16"),
    (re.compile(r"fp16|float16|half", re.IGNORECASE), "fp16"),
    (re.compile(r"fp8|float8", re.IGNORECASE), "fp8"),
    (re.compile(r"int8", re.IGNORECASE), "int8"),
    (re.compile(r"int4", re.IGNORECASE), "int4"),
    (re.compile(r"fp32|float", re.IGNORECASE), "fp32"),
)


def inspect_plan(library: ModuleType, plan: bytes, shapes: Shapes) -> str:
    """The inspector's JSON at the tuned-for shapes: with dynamic ones it knows no types. ``library`` is the module."""
    runtime = library.Runtime(library.Logger(library.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(plan)
    context = engine.create_execution_context()
    for name, (_, tuned, _) in shapes.items():
        context.set_input_shape(name, tuned)
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context
    information: str = inspector.get_engine_information(library.LayerInformationFormat.JSON)
    return information


def compute_types(information: str) -> dict[str, str]:
    """ONNX node -> type of the data operand, for layers that hold exactly one convolution or matrix product.

    A fused region with several products (a "foreign node") says nothing about any one of them: those are left out.
    """
    found: dict[str, str] = {}
    for layer in _layers(information):
        products = [name for name in _nodes(layer) if _PRODUCT.search(name)]
        types = _types(layer, "Inputs")
        if len(products) == 1 and types and types[0] is not None:
            found[products[0]] = types[0]
    return found


def layer_table(information: str) -> list[dict[str, Any]]:
    """One row per layer: its name and kind, types of its inputs and outputs (None: not said), tactic, ONNX nodes."""
    return [
        {
            "name": layer.get("Name", ""),
            "kind": layer.get("LayerType", ""),
            "inputs": _types(layer, "Inputs"),
            "outputs": _types(layer, "Outputs"),
            "tactic": str(layer.get("TacticName", "")),
            "nodes": _nodes(layer),
        }
        for layer in _layers(information)
    ]


def _layers(information: str) -> Iterator[dict[str, Any]]:
    """Layers with details; a plan that was built without them gives names alone, which are left out."""
    return (layer for layer in json.loads(information).get("Layers", []) if isinstance(layer, dict))


def _nodes(layer: dict[str, Any]) -> list[str]:
    return _ONNX_LAYER.findall(layer.get("Metadata", ""))


def _types(layer: dict[str, Any], side: str) -> list[str | None]:
    tensors = [tensor for tensor in layer.get(side, []) if isinstance(tensor, dict)]
    return [_type_of(" ".join(str(tensor.get(key, "")) for key in _TYPE_KEYS)) for tensor in tensors]


def _type_of(text: str) -> str | None:
    return next((kind for word, kind in _TYPES if word.search(text)), None)
