"""A plan opened on the current GPU, and the weights of a stripped one put back."""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from s2p_deploy.errors import IntegrityError, MissingEnvironmentError

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    import tensorrt_rtx as trt


@dataclass(frozen=True)
class OpenPlan:
    """A deserialized engine, the runtime that it needs alive, its library's module, and the SHA-256 of its plan."""

    library: ModuleType
    runtime: trt.Runtime
    engine: trt.ICudaEngine
    digest: str


def open_plan(library: str, plan: bytes) -> OpenPlan:
    """Opens a plan.

    Raises:
        MissingEnvironmentError: the library refuses it on this GPU.
    """
    import torch

    module = importlib.import_module(library)
    runtime = module.Runtime(module.Logger(module.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise MissingEnvironmentError(
            f"{library} cannot open this engine on {torch.cuda.get_device_name()}: build it for this GPU"
        )
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
