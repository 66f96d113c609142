"""ONNX Runtime. The engine is the prepared ONNX file and its external data.

Optimization ``reference`` is the default, because others are compared with this backend: nothing is fused, so that each
QuantizeLinear and DequantizeLinear runs as the graph says, and one thread is used, so that the bits of a sample depend
on neither its batch nor the number of cores (with two threads they do, measured). ``full`` lets ONNX Runtime fuse what
it can, on all cores (MatMul becomes an integer product; rounding moves).

Providers ``cuda``, ``tensorrt`` and ``nv_tensorrt_rtx`` run on an NVIDIA GPU, best from an fp16 graph, and with
``full`` optimization by default. Everything is computed in the graph's own type.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2p_deploy.engines.backend import Capabilities, Compiled
from s2p_deploy.engines.lowerings import apply_passes, int4_rule, weight_only
from s2p_deploy.engines.machine import (
    gpu_index,
    has_nvidia_driver,
    installed_version,
    int8_products_overflow,
    platform_name,
)
from s2p_deploy.engines.onnx_files import check_external_bytes, write_onnx
from s2p_deploy.engines.onnxruntime.providers import PROVIDERS, gpu_session, graph_traits, unavailable
from s2p_deploy.engines.onnxruntime.runners import DeviceRunner, OnnxRuntimeRunner
from s2p_deploy.engines.passes.fused_attention import FusedAttention
from s2p_deploy.engines.subgraphs import OnnxSubgraphs
from s2p_deploy.engines.support import support_of
from s2p_deploy.errors import IntegrityError
from s2p_deploy.records import Execution
from s2p_deploy.records.artifacts import file_digest, verified_files

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import onnx_ir as ir
    import onnxruntime
    from numpy.typing import NDArray

    from s2p_deploy.engines.backend import CompileRequest
    from s2p_deploy.engines.lowerings import Lowerings
    from s2p_deploy.engines.options import Shapes
    from s2p_deploy.engines.runner import Runner
    from s2p_deploy.engines.subgraphs import Subgraphs
    from s2p_deploy.records import Engine, ExportedGraph

MODEL = "denoiser.onnx"
_TYPES = {"float": "fp32", "float16": "fp16", "int8": "int8", "uint8": "int8"}
_FEW_WARNINGS = 3  # errors only
_CPU = "cpu"
_OPTIMIZATIONS = ("reference", "full")


@dataclass(frozen=True)
class OnnxRuntimeBackend:
    """ONNX Runtime as a backend."""

    name: str

    def capabilities(self) -> Capabilities:
        """Runs wherever it is installed."""
        version = installed_version("onnxruntime", "onnxruntime-gpu")
        if version is None:
            missing = "ONNX Runtime is not installed: pip install onnxruntime"
            return Capabilities(
                self.name, None, missing, False, ("fp32", "fp16"), providers=(_CPU,), optimizations=_OPTIMIZATIONS
            )
        lacking = unavailable()
        return Capabilities(
            self.name,
            version,
            None,
            executes=True,
            dtypes=("fp32", "fp16"),
            providers=(_CPU, *(name for name in PROVIDERS if name not in lacking)),
            optimizations=_OPTIMIZATIONS,
            unavailable=lacking,
        )

    def targets(self) -> tuple[str, ...]:
        """There is no choice."""
        return ()

    def environment(self, execution: Execution | None = None, device: str = "auto") -> dict[str, str]:
        """Library version, device and platform; on a GPU the execution provider too."""
        version = installed_version("onnxruntime", "onnxruntime-gpu")
        here = {"onnxruntime": str(version), "device": "cpu", "platform": platform_name()}
        name = None if execution is None else execution.provider
        if name not in PROVIDERS:
            return here
        missing = unavailable()
        provider = f"missing ({missing[name]})" if name in missing else PROVIDERS[name].name
        return here | {"device": "CUDA GPU" if has_nvidia_driver() else "no GPU", "provider": provider}

    def prepare_model(self, model: ir.Model, lowerings: Lowerings, execution: Execution) -> None:
        """Applies the chosen lowerings and expands INT4 weights beside quantized activations.

        On the CPU, ``full`` optimization fuses attention too.
        """
        keep = int4_rule(support_of(self.name), lowerings, wanted=weight_only, untried=weight_only)
        apply_passes(model, lowerings, keep)
        if execution.optimization == "full" and execution.provider == _CPU:
            FusedAttention()(model)

    def compile(self, request: CompileRequest) -> Compiled:
        """Writes the graph as the engine, loads it, and learns from one profiled run what computes what."""
        model = request.folder / MODEL
        write_onnx(request.model, model)
        files = tuple(path.name for path in (model, Path(f"{model}.data")) if path.exists())
        execution = request.options.execution
        options = _options(execution)
        options.enable_profiling = True
        options.profile_file_prefix = str(request.scratch / "onnxruntime")
        if execution.provider in PROVIDERS:
            quantized = any(node.op_type == "QuantizeLinear" for node in request.model.graph)
            digest = _joint_digest(file_digest(request.folder / name) for name in files)
            traits = graph_traits(request.inputs, request.options.resolved_profile, quantized=quantized, digest=digest)
            session = gpu_session(str(model), options, execution.provider, traits, gpu_index())
        else:
            session = _session(str(model), options)
        session.run(None, request.example)
        trace = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        return Compiled(files, self.environment(execution), compute_types(trace))

    def load(
        self,
        engine: Engine,
        files: Mapping[str, bytearray],
        bound: Mapping[str, NDArray[Any]],
        device: str = "auto",
    ) -> OnnxRuntimeRunner | DeviceRunner:
        """Opens a session from the verified bytes: ONNX Runtime opens no file of the engine."""
        model = _model_file(engine, files)
        data = {name: content for name, content in files.items() if name != model}
        options = _options(engine.execution)
        options.add_external_initializers_from_files_in_memory(
            list(data), list(data.values()), [len(content) for content in data.values()]
        )
        if engine.provider in PROVIDERS:
            profile = engine.profile
            quantized = any(layer.activation_bits == 8 for layer in engine.layers)
            digest = _joint_digest(engine.manifest.files[name] for name in engine.engine_files)
            traits = graph_traits(engine.inputs, profile, quantized=quantized, digest=digest)
            gpu = gpu_index(device)
            return DeviceRunner(gpu_session(bytes(files[model]), options, engine.provider, traits, gpu), bound, gpu)
        return OnnxRuntimeRunner(_session(bytes(files[model]), options), bound)

    def write_network(
        self, onnx_file: Path, folder: Path, shapes: Shapes, execution: Execution, device: str = "auto"
    ) -> Compiled:
        """Moves the ONNX file and its data, if it has any, to the folder."""
        files = [path for path in (onnx_file, Path(f"{onnx_file}.data")) if path.exists()]
        for path in files:
            shutil.move(path, folder / path.name)
        return Compiled(tuple(path.name for path in files), self.environment(execution), {})

    def load_network(self, files: Mapping[str, bytearray], execution: Execution, device: str = "auto") -> Runner:
        """Opens a session in memory."""
        (_, model), *rest = files.items()
        data = dict(rest)
        check_external_bytes(model, {name: len(content) for name, content in data.items()})
        options = _options(execution, quantized=False)
        if data:
            options.add_external_initializers_from_files_in_memory(
                list(data), list(data.values()), [len(content) for content in data.values()]
            )
        if execution.provider in PROVIDERS:
            return OnnxRuntimeRunner(gpu_session(bytes(model), options, execution.provider, gpu=gpu_index(device)), {})
        return OnnxRuntimeRunner(_session(bytes(model), options), {})

    def runner_from_model(self, model: ir.Model, execution: Execution) -> Runner:
        """Opens a session of a model; it may have more than the 2 GB of one message, so it goes through files."""
        options = _options(execution)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / MODEL
            write_onnx(model, path)
            if execution.provider in PROVIDERS:
                return OnnxRuntimeRunner(gpu_session(str(path), options, execution.provider, gpu=gpu_index()), {})
            return OnnxRuntimeRunner(_session(str(path), options), {})

    def subgraphs(self, engine: Engine, graph: ExportedGraph, scratch: Path) -> Subgraphs:
        """Opens the engine's ONNX file."""
        files = verified_files(engine)
        for name, content in files.items():
            (scratch / name).write_bytes(content)
        return OnnxSubgraphs(engine, graph, scratch / _model_file(engine, files))


def _model_file(engine: Engine, files: Mapping[str, bytearray]) -> str:
    """Names the ONNX file among an engine's files. Raises IntegrityError where there is none, or it reads elsewhere."""
    models = [name for name in files if name.endswith(".onnx")]
    if len(models) != 1:
        raise IntegrityError(f"{engine.folder} must hold one ONNX file, it names {len(models)}: build it again")
    sizes = {name: len(content) for name, content in files.items() if name != models[0]}
    check_external_bytes(files[models[0]], sizes)
    return models[0]


def compute_types(trace: list[dict[str, Any]]) -> dict[str, str]:
    """Returns ONNX node -> compute type of a profiled run: the type of a kernel's first tensor input."""
    types: dict[str, str] = {}
    for event in trace:
        name = event.get("name", "")
        inputs = event.get("args", {}).get("input_type_shape", [])
        if event.get("cat") != "Node" or not name.endswith("_kernel_time") or not inputs:
            continue
        kind = next(iter(inputs[0]))
        types[name.removesuffix("_kernel_time")] = _TYPES.get(kind, kind)
    return types


def _options(execution: Execution, *, quantized: bool = True) -> onnxruntime.SessionOptions:
    import onnxruntime

    levels = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    if execution.optimization != "reference":
        # above ENABLE_BASIC quantized layers become integer kernels
        options.graph_optimization_level = (
            levels.ORT_ENABLE_BASIC if quantized and int8_products_overflow() else levels.ORT_ENABLE_ALL
        )
        # else weight-only products code their activations as INT8 behind the graph's back
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    else:
        options.graph_optimization_level = levels.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
        options.use_deterministic_compute = True
    options.log_severity_level = _FEW_WARNINGS
    return options


def _joint_digest(digests: Iterable[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _session(model: str | bytes, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    import onnxruntime

    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
