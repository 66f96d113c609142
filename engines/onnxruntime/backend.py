"""ONNX Runtime. The engine is the prepared ONNX file and its external data.

Hint ``reference`` is the default, because this backend is the one that others are compared with: graph optimization is
off, so that every QuantizeLinear and DequantizeLinear runs as the graph says, and one thread is used, so that the bits
of a sample depend on neither its batch nor the number of cores (with two threads they do, measured). Hint ``fast`` lets
ONNX Runtime fuse what it can, on all cores (MatMul becomes an integer product; rounding moves).

Hints ``cuda``, ``tensorrt`` and ``nv_tensorrt_rtx`` run on an NVIDIA GPU through the execution providers of those
names, best from an fp16 graph.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.engines.backend import Capabilities, Compiled
from s2p_deploy.engines.libraries import has_nvidia_driver, installed_version, platform_name
from s2p_deploy.engines.lowerings import int4_rule
from s2p_deploy.engines.onnx_files import check_external_bytes, read_onnx
from s2p_deploy.engines.onnxruntime.device_runner import DeviceRunner
from s2p_deploy.engines.onnxruntime.providers import PROVIDERS, gpu_session, graph_traits, unavailable
from s2p_deploy.engines.options import BuildOptions
from s2p_deploy.engines.parts import OnnxParts
from s2p_deploy.engines.passes.fused_attention import FusedAttention
from s2p_deploy.engines.prepare import apply_passes, prepare_graph, weight_only
from s2p_deploy.engines.runner import ClosingRunner
from s2p_deploy.engines.support import support_of
from s2p_deploy.engines.verified_bytes import verified_files
from s2p_deploy.errors import IntegrityError
from s2p_deploy.records.manifest import file_digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import onnx
    import onnx_ir as ir
    import onnxruntime
    from numpy.typing import NDArray

    from s2p_deploy.engines.backend import CompileRequest
    from s2p_deploy.engines.lowerings import Lowerings
    from s2p_deploy.engines.parts import EngineParts
    from s2p_deploy.engines.runner import Runner
    from s2p_deploy.records import Engine, ExportedGraph

_TYPES = {"float": "fp32", "float16": "fp16", "int8": "int8", "uint8": "int8"}
_FEW_WARNINGS = 3  # errors only
_CPU_HINTS = ("reference", "fast")


@dataclass(frozen=True)
class OnnxRuntimeBackend:
    """The four verbs."""

    name: str

    def capabilities(self) -> Capabilities:
        """Runs wherever it is installed."""
        version = installed_version("onnxruntime", "onnxruntime-gpu")
        if version is None:
            missing = "ONNX Runtime is not installed: pip install onnxruntime"
            return Capabilities(self.name, None, missing, executes=False, dtypes=("fp32", "fp16"), hints=_CPU_HINTS)
        lacking = unavailable()
        hints = (*_CPU_HINTS, *(hint for hint in PROVIDERS if hint not in lacking))
        return Capabilities(self.name, version, None, True, ("fp32", "fp16"), hints, lacking)

    def environment(self, hint: str | None = None) -> dict[str, str]:
        """Library version, device and platform; on a GPU the execution provider too."""
        version = installed_version("onnxruntime", "onnxruntime-gpu")
        here = {"onnxruntime": str(version), "device": "cpu", "platform": platform_name()}
        if hint not in PROVIDERS:
            return here
        missing = unavailable()
        provider = f"missing ({missing[hint]})" if hint in missing else PROVIDERS[hint].name
        return here | {"device": "CUDA GPU" if has_nvidia_driver() else "no GPU", "provider": provider}

    def prepare_model(self, model: ir.Model, lowerings: Lowerings, hint: str | None) -> None:
        """The chosen lowerings. Expands INT4 weights beside quantized activations; ``fast`` fuses attention."""
        keep = int4_rule(support_of(self.name), lowerings, wanted=weight_only, untried=weight_only)
        apply_passes(model, lowerings, keep)
        if hint == "fast":
            FusedAttention()(model)

    def prepare(self, graph: ExportedGraph, folder: Path, options: BuildOptions) -> Path:
        """The canonical graph in this backend's form."""
        return prepare_graph(graph, folder, self, options)

    def compile(self, request: CompileRequest) -> Compiled:
        """Moves the prepared files into the engine, loads them, and learns from one profiled run what computes what."""
        files = []
        for path in (request.onnx_path, Path(f"{request.onnx_path}.data")):
            if path.exists():
                shutil.move(path, request.folder / path.name)
                files.append(path.name)
        hint, model = str(request.options.hint), request.folder / request.onnx_path.name
        options = _options(hint)
        options.enable_profiling = True
        options.profile_file_prefix = str(request.scratch / "onnxruntime")
        if hint in PROVIDERS:
            quantized = any(node.op_type == "QuantizeLinear" for node in read_onnx(model).graph)
            digest = _joint_digest(file_digest(request.folder / name) for name in files)
            traits = graph_traits(request.inputs, request.options.profile, quantized=quantized, digest=digest)
            session = gpu_session(str(model), options, hint, traits)
        else:
            session = _session(str(model), options)
        session.run(None, request.example)
        trace = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        return Compiled(tuple(files), self.environment(hint), compute_types(trace))

    def load(
        self, engine: Engine, files: Mapping[str, bytearray], bound: Mapping[str, NDArray[Any]]
    ) -> OnnxRuntimeRunner | DeviceRunner:
        """A session from the verified bytes: ONNX Runtime opens no file of the engine."""
        model = _model_file(engine, files)
        data = {name: content for name, content in files.items() if name != model}
        options = _options(engine.hint)
        options.add_external_initializers_from_files_in_memory(
            list(data), list(data.values()), [len(content) for content in data.values()]
        )
        if engine.hint in PROVIDERS:
            profile = BuildOptions.from_json(engine.manifest.content["options"]).profile
            quantized = any(site.activation_bits == 8 for site in engine.sites)
            digest = _joint_digest(engine.manifest.files[name] for name in engine.engine_files)
            traits = graph_traits(engine.inputs, profile, quantized=quantized, digest=digest)
            return DeviceRunner(gpu_session(bytes(files[model]), options, engine.hint, traits), bound)
        return OnnxRuntimeRunner(_session(bytes(files[model]), options), bound)

    def runner_from_model(self, model: onnx.ModelProto, hint: str) -> Runner:
        """A session of a model in memory."""
        data, options = model.SerializeToString(), _options(hint)
        session = gpu_session(data, options, hint, None) if hint in PROVIDERS else _session(data, options)
        return OnnxRuntimeRunner(session, {})

    def parts(self, engine: Engine, graph: ExportedGraph, scratch: Path) -> EngineParts:
        """Of the engine's ONNX file, as prepare wrote it."""
        files = verified_files(engine)
        for name, content in files.items():
            (scratch / name).write_bytes(content)
        return OnnxParts(engine, graph, scratch / _model_file(engine, files))


class OnnxRuntimeRunner(ClosingRunner):
    """An open session."""

    def __init__(self, session: onnxruntime.InferenceSession, bound: Mapping[str, NDArray[Any]]) -> None:
        self._session: onnxruntime.InferenceSession | None = session
        self._bound = {name: np.ascontiguousarray(value) for name, value in bound.items()}  # passed without a copy
        self._outputs = [output.name for output in session.get_outputs()]

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All outputs of the graph."""
        if self._session is None:
            raise ValueError("the runner is closed")
        values = self._session.run(self._outputs, {**inputs, **self._bound})
        return dict(zip(self._outputs, values, strict=True))

    def close(self) -> None:
        """Drops the session."""
        self._session = None


def _model_file(engine: Engine, files: Mapping[str, bytearray]) -> str:
    """The name of the ONNX file among an engine's files. Raises IntegrityError for what is none, or reads elsewhere."""
    models = [name for name in files if name.endswith(".onnx")]
    if len(models) != 1:
        raise IntegrityError(f"{engine.folder} must hold one ONNX file, it names {len(models)}: build it again")
    sizes = {name: len(content) for name, content in files.items() if name != models[0]}
    check_external_bytes(files[models[0]], sizes)
    return models[0]


def compute_types(trace: list[dict[str, Any]]) -> dict[str, str]:
    """What each node of a profiled run multiplied, by ONNX node name: the type of its first tensor input."""
    found: dict[str, str] = {}
    for event in trace:
        name = event.get("name", "")
        inputs = event.get("args", {}).get("input_type_shape", [])
        if event.get("cat") != "Node" or not name.endswith("_kernel_time") or not inputs:
            continue
        kind = next(iter(inputs[0]))
        found[name.removesuffix("_kernel_time")] = _TYPES.get(kind, kind)
    return found


def _options(hint: str) -> onnxruntime.SessionOptions:
    import onnxruntime

    levels = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    if hint != "reference":
        options.graph_optimization_level = levels.ORT_ENABLE_ALL
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
