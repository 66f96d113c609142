"""A plan opened on the current GPU: its weights put back where they were stripped, and what its layers compute in.

TensorRT 10 names a tensor's type under ``Format/Datatype``, TensorRT 11 apart from its format; both are read.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from s2p_deploy.errors import IntegrityError, MissingEnvironmentError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import ModuleType

    import tensorrt_rtx as trt

    from s2p_deploy.engines.options import Shapes

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


@dataclass(frozen=True)
class OpenPlan:
    """Deserialized engine, the runtime that it needs alive, its library's module, and the SHA-256 of its plan."""

    library: ModuleType
    runtime: trt.Runtime
    engine: trt.ICudaEngine
    digest: str


def open_plan(library: str, plan: bytes | bytearray) -> OpenPlan:
    """Opens a plan, which is read where it lies.

    Raises:
        MissingEnvironmentError: the library refuses it on this GPU.
    """
    import torch

    module = importlib.import_module(library)
    runtime = module.Runtime(module.Logger(module.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "a machine without a CUDA GPU"
        raise MissingEnvironmentError(f"{library} cannot open this engine on {device}: build it for this GPU")
    return OpenPlan(module, runtime, engine, hashlib.sha256(plan).hexdigest())


def refit(plan: OpenPlan, onnx_path: Path) -> None:
    """Puts the weights of the prepared graph that the plan was built from into it.

    Raises:
        IntegrityError: the graph is not that one, or lacks a weight.
    """
    logger = plan.runtime.logger
    refitter = plan.library.Refitter(plan.engine, logger)
    parser = plan.library.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_file(str(onnx_path)):
        reasons = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise IntegrityError(f"the weights of {onnx_path} do not fit the stripped engine: {reasons}")
    missing = refitter.get_missing_weights()
    if missing or not refitter.refit_cuda_engine():
        lacking = f"weight {missing[0]} is missing" if missing else "TensorRT refused them, see its log"
        raise IntegrityError(f"the stripped engine cannot be refitted: {lacking}")


def inspect_plan(library: ModuleType, plan: bytes, shapes: Shapes) -> str | None:
    """Returns the inspector's JSON at the tuned-for shapes: with dynamic ones it knows no types.

    None where the library does not open the plan on this GPU, for which a plan built ahead of time need not be.
    """
    runtime = library.Runtime(library.Logger(library.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(plan)
    context = None if engine is None else engine.create_execution_context()
    if context is None:
        return None
    for name, (_, tuned, _) in shapes.items():
        context.set_input_shape(name, tuned)
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context
    information: str = inspector.get_engine_information(library.LayerInformationFormat.JSON)
    return information


def compute_types(information: str) -> dict[str, str]:
    """Returns ONNX node -> type of the data operand, for layers that hold exactly one convolution or matrix product.

    A fused region with several products (a "foreign node") says nothing about any one of them: those are left out.
    """
    compute: dict[str, str] = {}
    for layer in _layers(information):
        products = [name for name in _nodes(layer) if _PRODUCT.search(name)]
        types = _types(layer, "Inputs")
        if len(products) == 1 and types and types[0] is not None:
            compute[products[0]] = types[0]
    return compute


def layer_table(information: str) -> list[dict[str, Any]]:
    """Describes every layer: its name and kind, types of inputs and outputs (None: not said), tactic, ONNX nodes."""
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
    texts = (" ".join(str(tensor.get(key, "")) for key in _TYPE_KEYS) for tensor in tensors)
    return [next((dtype for word, dtype in _TYPES if word.search(text)), None) for text in texts]
