"""TensorRT 10/11 (``tensorrt``) and TensorRT-RTX (``tensorrt_rtx``).

The first builds on the GPU that the engine is for, the second ahead of time, without a GPU. The engine is one file,
``denoiser.plan``, from an fp16 graph that carries every type; built where it can be opened, it also has
``layers.json``, what the engine inspector says of every layer.
"""

from __future__ import annotations

import importlib
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from s2p_deploy.child_process import Limits
from s2p_deploy.engines.backend import Capabilities, Compiled, call_in_child
from s2p_deploy.engines.lowerings import (
    any_use,
    apply_passes,
    int4_rule,
    lowered_model,
    weight_only,
    weight_only_or_matmul,
)
from s2p_deploy.engines.machine import compute_capability, gpu_index, installed_version, platform_name
from s2p_deploy.engines.onnx_files import write_onnx
from s2p_deploy.engines.options import BuildOptions, profile_shapes
from s2p_deploy.engines.runner import BOUND
from s2p_deploy.engines.support import support_of
from s2p_deploy.engines.tensorrt.builder import PlanOptions, build_plan
from s2p_deploy.engines.tensorrt.launchers import timing_cache
from s2p_deploy.engines.tensorrt.plan import compute_types, inspect_plan, layer_table, open_plan, refit
from s2p_deploy.engines.tensorrt.targets import (
    Capability,
    capability_name,
    described_targets,
    named_capabilities,
    runs_on,
)
from s2p_deploy.errors import MissingEnvironmentError
from s2p_deploy.records import Execution, ExportedGraph
from s2p_deploy.records.artifacts import parent_folder

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir as ir
    import torch
    from numpy.typing import NDArray

    from s2p_deploy.engines.backend import CompileRequest
    from s2p_deploy.engines.lowerings import Lowerings
    from s2p_deploy.engines.options import Shapes
    from s2p_deploy.engines.runner import Runner
    from s2p_deploy.engines.tensorrt.runner import TensorRtRunner
    from s2p_deploy.records import Engine

PLAN, LAYERS = "denoiser.plan", "layers.json"
RTX = "tensorrt_rtx"
GPU_MEMORY = "gpu_memory"  # among a manifest's notes: the fields of PlanMemory
_GPU = "CUDA GPU"
_NETWORK_TIMEOUT_S = 1800.0
_MISSING = {
    RTX: "TensorRT-RTX is not installed: pip install 's2p-deploy[rtx]'",
    "tensorrt": "TensorRT is not installed: pip install 's2p-deploy[tensorrt]' on a machine with an NVIDIA GPU "
    "(without a GPU, --backend tensorrt_rtx builds ahead of time)",
}


@dataclass(frozen=True)
class TensorRtBackend:
    """TensorRT or TensorRT-RTX as a backend. ``name`` is the library's module too."""

    name: str

    def capabilities(self) -> Capabilities:
        """Executes where there is a CUDA GPU (for TensorRT-RTX: one that the library names, or a later one)."""
        version = installed_version(self.name, f"{self.name}_cu13", f"{self.name}_cu12")
        capability = compute_capability() if version else None
        executes = version is not None and refusal(self.name, capability) is None
        missing = None if version else _MISSING[self.name]
        refits: Literal["here", "with a GPU"] = "with a GPU" if capability is None else "here"
        return Capabilities(self.name, version, missing, executes, ("fp16",), refit=refits, any_size=False)

    def targets(self) -> tuple[str, ...]:
        """Lists those that TensorRT-RTX names; none of TensorRT, which builds for the GPU that it is on."""
        if self.name != RTX:
            return ()
        return tuple(map(capability_name, named_capabilities(importlib.import_module(self.name))))

    def environment(self, execution: Execution | None = None, device: str = "auto") -> dict[str, str]:
        """Library version and device; data-centre engines also belong to a compute capability and a platform."""
        capability = compute_capability(device)
        here = {self.name: str(self.capabilities().version), "device": _GPU if capability else "no GPU"}
        return here | self._bound_to(capability)

    def prepare_model(self, model: ir.Model, lowerings: Lowerings, execution: Execution) -> None:
        """Applies the chosen lowerings and expands INT4 where the library refuses it (beside INT8: all but MatMul)."""
        untried = weight_only_or_matmul if self.name == RTX else weight_only
        keep = int4_rule(support_of(self.name), lowerings, wanted=any_use, untried=untried)
        apply_passes(model, lowerings, keep)

    def compile(self, request: CompileRequest) -> Compiled:
        """Builds the plan; with a GPU here, asks the engine inspector what each layer computes in."""
        capability = self._builder_capability()
        # where the scale table's timesteps are open, the plan is tuned for those of the graph's own table
        timesteps = len(request.example[BOUND]) if BOUND in request.example else 1
        shapes = profile_shapes(request.inputs, request.options.resolved_profile, timesteps)
        onnx_path, plan = request.scratch / "denoiser.onnx", request.folder / PLAN
        write_onnx(request.model, onnx_path)
        build_plan(self.name, onnx_path, shapes, plan, self._plan_options(request.options, capability))
        library = importlib.import_module(self.name)
        notes: dict[str, Any] = {}
        if self.name == RTX:
            notes["target"] = described_targets(library, request.options.compute_capabilities)
        compute = {}
        if self.capabilities().executes and not request.options.stripped:  # one without weights cannot be opened
            try:
                inspection = inspect_plan(library, plan.read_bytes(), shapes)
            except MissingEnvironmentError as error:  # a plan for other GPUs is no failed build
                notes["not inspected"] = str(error)
            else:
                compute = compute_types(inspection.information)
                table = json.dumps({"layers": layer_table(inspection.information)}, indent=1) + "\n"
                (request.folder / LAYERS).write_text(table, encoding="utf-8")
                notes[GPU_MEMORY] = asdict(inspection.memory)
        environment = self.environment() | {"device": _GPU}
        return Compiled((PLAN,), environment, compute, notes)

    def load(
        self,
        engine: Engine,
        files: Mapping[str, bytearray],
        bound: Mapping[str, NDArray[Any]],
        device: str = "auto",
    ) -> TensorRtRunner:
        """Opens a context on the GPU; the weights of a stripped engine come from the graph that it was built from.

        Raises:
            MissingEnvironmentError: there is no GPU that can run it.
            InputError: the graph of a stripped engine is not where it was. IntegrityError: it is another one.
        """
        from s2p_deploy.engines.tensorrt.runner import TensorRtRunner

        self._require_gpu(str(engine.folder), device)
        plan = open_plan(self.name, files[PLAN], _cuda(device))
        options = BuildOptions.from_json(engine.manifest.content["options"])
        if options.stripped:
            graph = ExportedGraph.open(parent_folder(engine.folder, engine.manifest, "graph"))
            with tempfile.TemporaryDirectory() as folder:
                onnx_path = Path(folder) / "denoiser.onnx"
                write_onnx(lowered_model(graph, self, options)[0], onnx_path)
                refit(plan, onnx_path)
        return TensorRtRunner(plan, bound)

    def write_network(
        self, onnx_file: Path, folder: Path, shapes: Shapes, execution: Execution, device: str = "auto"
    ) -> Compiled:
        """Builds the network's plan in a child process; TensorRT on a GPU, TensorRT-RTX anywhere."""
        plan = folder / f"{onnx_file.stem}.plan"
        options = asdict(self._plan_options(BuildOptions(), self._builder_capability(device), device))
        message = {"library": self.name, "onnx": str(onnx_file), "shapes": shapes, "out": str(plan)}
        message |= {"options": options, "device": device}
        call_in_child("s2p_deploy.engines.tensorrt.builder:build_in_child", message, Limits(_NETWORK_TIMEOUT_S))
        return Compiled((plan.name,), self.environment(execution, device) | {"device": _GPU}, {})

    def load_network(self, files: Mapping[str, bytearray], execution: Execution, device: str = "auto") -> Runner:
        """Opens a context on the GPU."""
        from s2p_deploy.engines.tensorrt.runner import TensorRtRunner

        ((name, plan),) = files.items()
        self._require_gpu(name, device)
        return TensorRtRunner(open_plan(self.name, plan, _cuda(device)), {})

    def runner_from_model(self, model: ir.Model, execution: Execution) -> Runner:
        """Makes a runner that builds the model in a child process for the sizes that it is called with."""
        from s2p_deploy.engines.tensorrt.subgraph import SubgraphRunner

        self._require_gpu("a subgraph")
        return SubgraphRunner(self.name, model, _cuda("auto"))

    def subgraphs(self, engine: Engine, graph: ExportedGraph, scratch: Path) -> None:
        """Nothing can be cut out of a plan."""

    def _builder_capability(self, device: str = "auto") -> Capability | None:
        """Returns the compute capability of the GPU here; None where there is none and none is needed to build."""
        capability = compute_capability(device)
        if self.name != RTX and capability is None:
            raise MissingEnvironmentError("TensorRT builds on the GPU that the engine is for, and there is none here")
        return capability

    def _plan_options(self, options: BuildOptions, capability: Capability | None, device: str = "auto") -> PlanOptions:
        timings = None
        if self.name != RTX and capability is not None:
            import torch

            name = torch.cuda.get_device_name(gpu_index(device))
            timings = str(timing_cache(str(self.capabilities().version), name, capability))
        return PlanOptions(options.refit, options.stripped, timings, options.compute_capabilities)

    def _bound_to(self, capability: Capability | None) -> dict[str, str]:
        if self.name == RTX:
            return {}  # portable between GPUs and between Linux and Windows, not between releases
        return {
            "compute_capability": capability_name(capability) if capability else "none",
            "platform": platform_name(),
        }

    def _require_gpu(self, what: str, device: str = "auto") -> None:
        reason = refusal(self.name, compute_capability(device))
        if reason is not None:
            raise MissingEnvironmentError(f"{what} {reason}")


def _cuda(device: str) -> torch.device:
    import torch

    return torch.device("cuda", gpu_index(device))


def refusal(name: str, capability: Capability | None) -> str | None:
    """Why a GPU of this compute capability (None: no GPU) runs no engine of a library; None where it does."""
    if capability is None:
        return "needs a CUDA GPU to run, and there is none here: load it on a machine with one"
    if name != RTX:
        return None
    library = importlib.import_module(name)
    if runs_on(library, capability):
        return None
    on = ", ".join(map(capability_name, named_capabilities(library)))
    return (
        f"cannot run here: TensorRT-RTX {library.__version__} runs on compute capability {on} and later, not on "
        f"{capability_name(capability)}: build with --backend tensorrt"
    )
