"""TensorRT 10/11 (``tensorrt``) and TensorRT-RTX (``tensorrt_rtx``).

The first builds on the GPU that the engine is for, the second ahead of time, without a GPU. The engine is one file,
``denoiser.plan``, from an fp16 graph that carries every type.
"""

from __future__ import annotations

import importlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2p_deploy.engines.backend import Capabilities, Compiled
from s2p_deploy.engines.isolation import Limits, run_child
from s2p_deploy.engines.libraries import installed_version, platform_name
from s2p_deploy.engines.passes.expand_int4 import ExpandInt4
from s2p_deploy.engines.prepare import prepare_graph, weight_only, weight_only_or_matmul
from s2p_deploy.engines.tensorrt.builder import Shapes, build_plan
from s2p_deploy.engines.tensorrt.inspector import compute_types
from s2p_deploy.errors import InputError, MissingEnvironmentError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx
    import onnx_ir as ir
    from numpy.typing import NDArray

    from s2p_deploy.engines.backend import CompileRequest
    from s2p_deploy.engines.options import BuildOptions
    from s2p_deploy.engines.runner import Runner
    from s2p_deploy.engines.tensorrt.runner import TensorRtRunner
    from s2p_deploy.records import Engine, ExportedGraph

PLAN = "denoiser.plan"
RTX = "tensorrt_rtx"
_GPU = "CUDA GPU"
_BLOCK_TIMEOUT_S = 600.0
_NOT_ON_RTX = (9, 0)  # H100 and H200
_BUILDER = "s2p_deploy.engines.tensorrt.builder"
_MISSING = {
    RTX: "TensorRT-RTX is not installed: pip install 's2p-deploy[rtx]'",
    "tensorrt": "TensorRT is not installed: pip install 's2p-deploy[tensorrt]' on a machine with an NVIDIA GPU "
    "(without a GPU, --backend tensorrt_rtx builds ahead of time)",
}


@dataclass(frozen=True)
class TensorRtBackend:
    """The four verbs. ``name`` is the library's module too."""

    name: str

    def capabilities(self) -> Capabilities:
        """Executes where there is a CUDA GPU (for TensorRT-RTX: not of compute capability 9.0)."""
        version = installed_version(self.name, f"{self.name}_cu13", f"{self.name}_cu12")
        capability = _compute_capability() if version else None
        executes = capability is not None and not (self.name == RTX and capability == _NOT_ON_RTX)
        missing = None if version else _MISSING[self.name]
        return Capabilities(self.name, version, missing, executes, ("fp16",), ("strongly_typed",))

    def environment(self) -> dict[str, str]:
        """Library version and device; data-centre engines also belong to a compute capability and a platform."""
        capability = _compute_capability()
        here = {self.name: str(self.capabilities().version), "device": _GPU if capability else "no GPU"}
        return here | self._bound_to(capability)

    def prepare_model(self, model: ir.Model) -> None:
        """Expands INT4 where the library refuses it: TensorRT-RTX takes it in MatMul beside INT8 activations."""
        ExpandInt4(weight_only_or_matmul if self.name == RTX else weight_only)(model)

    def prepare(self, graph: ExportedGraph, folder: Path, options: BuildOptions) -> Path:
        """The canonical fp16 graph with INT4 expanded where needed."""
        return prepare_graph(graph, folder, self.prepare_model)

    def compile(self, request: CompileRequest) -> Compiled:
        """Builds the plan; with a GPU here, asks the engine inspector what each layer computes in."""
        capability = _compute_capability()
        if self.name != RTX and capability is None:
            raise MissingEnvironmentError("TensorRT builds on the GPU that the engine is for, and there is none here")
        plan = request.folder / PLAN
        build_plan(self.name, request.onnx_path, _shapes(request), plan)
        compute = compute_types(_inspect(self.name, plan.read_bytes())) if self.capabilities().executes else {}
        environment = self.environment() | {"device": _GPU}
        notes = {"target": "ahead of time: compute capability 8.6, 8.9, 12.0 and later"} if self.name == RTX else {}
        return Compiled((PLAN,), environment, compute, notes)

    def load(self, engine: Engine, files: Mapping[str, bytearray], bound: Mapping[str, NDArray[Any]]) -> TensorRtRunner:
        """A context on the GPU. Raises MissingEnvironmentError where there is none that can run it."""
        from s2p_deploy.engines.tensorrt.runner import TensorRtRunner

        self._require_gpu(str(engine.folder))
        return TensorRtRunner(self.name, bytes(files[PLAN]), bound)

    def runner_from_model(self, model: onnx.ModelProto, hint: str) -> Runner:
        """Builds a small model in a child process and runs it here; batch sizes 1 to 32."""
        from s2p_deploy.engines.tensorrt.runner import TensorRtRunner

        self._require_gpu(f"a {hint} block")
        with tempfile.TemporaryDirectory() as folder:
            onnx_path, plan = Path(folder) / "block.onnx", Path(folder) / PLAN
            onnx_path.write_bytes(model.SerializeToString())
            shapes = {value.name: _block_shapes(value) for value in model.graph.input}
            request = {"library": self.name, "onnx": str(onnx_path), "shapes": shapes, "out": str(plan)}
            run_child(_BUILDER, request, Path(folder), Limits(_BLOCK_TIMEOUT_S))
            return TensorRtRunner(self.name, plan.read_bytes(), {})

    def _bound_to(self, capability: tuple[int, int] | None) -> dict[str, str]:
        if self.name == RTX:
            return {}  # portable between GPUs and between Linux and Windows, not between releases
        return {
            "compute_capability": f"{capability[0]}.{capability[1]}" if capability else "none",
            "platform": platform_name(),
        }

    def _require_gpu(self, what: str) -> None:
        capability = _compute_capability()
        if capability is None:
            raise MissingEnvironmentError(
                f"{what} needs a CUDA GPU to run, and there is none here: load it on a machine with one"
            )
        if self.name == RTX and capability == _NOT_ON_RTX:
            raise MissingEnvironmentError(
                f"{what}: TensorRT-RTX does not run on compute capability 9.0: build with --backend tensorrt"
            )


def _compute_capability() -> tuple[int, int] | None:
    import torch

    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def _inspect(library: str, plan: bytes) -> str:
    trt = importlib.import_module(library)
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(plan)
    information: str = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return information


def _shapes(request: CompileRequest) -> Shapes:
    """Every input at the profile's batch sizes; the scale table's rows do not vary within one engine."""
    profile = request.options.profile
    fixed = request.example["act_scales"].shape if "act_scales" in request.example else ()
    return {
        spec.name: (fixed, fixed, fixed)
        if spec.name == "act_scales"
        else (
            profile.shape(spec, profile.minimum),
            profile.shape(spec, profile.optimum),
            profile.shape(spec, profile.maximum),
        )
        for spec in request.inputs
    }


def _block_shapes(value: onnx.ValueInfoProto) -> list[list[int]]:
    sizes = value.type.tensor_type.shape.dim
    if any(size.dim_param not in {"", "batch"} for size in sizes):
        raise InputError(f"input {value.name} has a dynamic size besides 'batch'")
    return [[batch if size.dim_param else size.dim_value for size in sizes] for batch in (1, 2, 32)]
