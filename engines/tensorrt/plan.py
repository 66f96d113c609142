"""A plan opened on a GPU: its validity there, its weights put back, its memory, and what its layers compute in.

TensorRT 10 names a tensor's type under ``Format/Datatype``, TensorRT 11 apart from its format; both are read.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from s2p_deploy.errors import IntegrityError, MissingEnvironmentError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import ModuleType

    import tensorrt_rtx as trt
    import torch

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


# what the library says of a plan that it cannot open, and what to do about it
_INVALID = {
    "MALFORMED_ENGINE": "it is no plan of this library: build it again",
    "VERSION_MISMATCH": "another version of the library made it: build it again with this one",
    "UNSUPPORTED_CC": "it is not for this GPU's compute capability: build it for that one",
    "INSUFFICIENT_GPU_MEMORY": "it needs more memory than the GPU has: free some, or build with a smaller --batch",
    "OLD_CUDA_DRIVER": "the GPU's driver is too old for it: install a newer one",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old for it: install a newer one",
    "CUDA_ERROR": "the CUDA driver or runtime does not work: install it again",
}


@dataclass(frozen=True)
class OpenPlan:
    """Deserialized engine, its library's module, the runtime that it needs alive, its plan's SHA-256, and its GPU."""

    library: ModuleType
    runtime: trt.Runtime
    engine: trt.ICudaEngine
    digest: str
    device: torch.device


@dataclass(frozen=True)
class PlanMemory:
    """Bytes of a GPU's memory that a plan takes, as the library says; None where its version does not.

    ``weights`` as long as it is open; ``tuned`` and ``largest`` for a step of the shapes that it is tuned for, and of
    its largest ones.
    """

    weights: int | None
    tuned: int | None
    largest: int

    def __str__(self) -> str:
        steps = (("a step of the size tuned for", self.tuned), ("a step of the largest", self.largest))
        named = (("weights", self.weights), *steps)
        return ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in named if size is not None)


@dataclass(frozen=True)
class Inspection:
    """The engine inspector's JSON, and the memory that the plan takes."""

    information: str
    memory: PlanMemory


def open_plan(library: str, plan: bytes | bytearray, device: torch.device) -> OpenPlan:
    """Opens a plan on a GPU, a device with its index. The plan is read where it lies.

    Raises:
        MissingEnvironmentError: the library refuses it there.
    """
    import torch

    module = importlib.import_module(library)
    with torch.cuda.device(device):
        runtime = module.Runtime(module.Logger(module.Logger.ERROR))
        return OpenPlan(module, runtime, _opened(module, runtime, plan), hashlib.sha256(plan).hexdigest(), device)


def _opened(library: ModuleType, runtime: trt.Runtime, plan: bytes | bytearray) -> trt.ICudaEngine:
    """Opens a plan on the current GPU. Raises MissingEnvironmentError where the library refuses it."""
    check_validity(library, runtime, plan)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise MissingEnvironmentError(f"{library.__name__} cannot open this engine on this GPU: build it for this one")
    return engine


def check_validity(library: ModuleType, runtime: trt.Runtime, plan: bytes | bytearray) -> None:
    """Asks the library, where its version can say, whether a plan runs on the current GPU; warns where it is slower.

    To be asked beside a GPU's driver only: without one TensorRT-RTX calls every plan invalid, for no reason.

    Raises:
        MissingEnvironmentError: it does not, and why.
    """
    if not hasattr(runtime, "get_engine_validity"):
        return
    validity, diagnostics = runtime.get_engine_validity(plan)
    given = library.EngineInvalidityDiagnostics.__members__
    bits = {name: int(getattr(value, "value", value)) for name, value in given.items()}
    reasons = [text for name, text in _INVALID.items() if int(diagnostics) & bits.get(name, 0)]
    if validity == library.EngineValidity.SUBOPTIMAL:
        said = "; ".join(reasons) or "build it for this GPU to see whether that is faster"
        logging.getLogger(__name__).warning("%s says that this engine may be slow here: %s", library.__name__, said)
    elif validity == library.EngineValidity.INVALID and reasons:
        raise MissingEnvironmentError(f"{library.__name__} cannot open this engine here: {'; '.join(reasons)}")


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


def inspect_plan(library: ModuleType, plan: bytes, shapes: Shapes) -> Inspection:
    """Inspects a plan on the current GPU at the tuned-for shapes: with dynamic ones the inspector knows no types.

    Raises:
        MissingEnvironmentError: the library does not open it there: one built ahead of time may be for another GPU.
    """
    runtime = library.Runtime(library.Logger(library.Logger.ERROR))
    engine = _opened(library, runtime, plan)
    # no memory is taken for it: nothing runs
    context = engine.create_execution_context(library.ExecutionContextAllocationStrategy.USER_MANAGED)
    if context is None:
        raise MissingEnvironmentError(f"{library.__name__} made no execution context: see its log")
    for name, (_, tuned, _) in shapes.items():
        context.set_input_shape(name, tuned)
    tuned_for = context.update_device_memory_size_for_shapes()
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context
    information: str = inspector.get_engine_information(library.LayerInformationFormat.JSON)
    return Inspection(information, plan_memory(library, engine, tuned_for))


def plan_memory(library: ModuleType, engine: trt.ICudaEngine, tuned: int | None = None) -> PlanMemory:
    """Asks the library for the memory that a plan takes; ``tuned`` is that of a step at the shapes tuned for."""
    statistics = getattr(library, "EngineStat", None)
    weights = None if statistics is None else engine.get_engine_stat(statistics.TOTAL_WEIGHTS_SIZE)
    return PlanMemory(None if weights is None else int(weights), tuned, int(engine.device_memory_size_v2))


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
