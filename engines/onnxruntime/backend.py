"""ONNX Runtime, CPU execution provider. The engine is the prepared ONNX file and its external data.

Hint ``reference`` is the default, because this backend is the one that others are compared with: graph optimization is
off, so that every QuantizeLinear and DequantizeLinear runs as the graph says, and one thread is used, so that the bits
of a sample depend on neither its batch nor the number of cores (with two threads they do, measured). Hint ``fast`` lets
ONNX Runtime fuse what it can, on all cores (MatMul becomes an integer product; rounding moves).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.engines.backend import Capabilities, Compiled
from s2p_deploy.engines.libraries import installed_version, platform_name
from s2p_deploy.engines.onnx_files import check_external_bytes
from s2p_deploy.engines.passes.expand_int4 import ExpandInt4
from s2p_deploy.engines.prepare import prepare_graph, weight_only
from s2p_deploy.engines.runner import ClosingRunner
from s2p_deploy.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx
    import onnx_ir as ir
    import onnxruntime
    from numpy.typing import NDArray

    from s2p_deploy.engines.backend import CompileRequest
    from s2p_deploy.engines.options import BuildOptions
    from s2p_deploy.engines.runner import Runner
    from s2p_deploy.records import Engine, ExportedGraph

_TYPES = {"float": "fp32", "float16": "fp16", "int8": "int8", "uint8": "int8"}
_FEW_WARNINGS = 3  # errors only


@dataclass(frozen=True)
class OnnxRuntimeBackend:
    """The four verbs."""

    name: str

    def capabilities(self) -> Capabilities:
        """Runs wherever it is installed."""
        version = installed_version("onnxruntime", "onnxruntime-gpu")
        missing = None if version else "ONNX Runtime is not installed: pip install onnxruntime"
        return Capabilities(self.name, version, missing, version is not None, ("fp32", "fp16"), ("reference", "fast"))

    def environment(self) -> dict[str, str]:
        """Library version, device and platform."""
        return {"onnxruntime": str(self.capabilities().version), "device": "cpu", "platform": platform_name()}

    def prepare_model(self, model: ir.Model) -> None:
        """Expands INT4 weights of sites with quantized activations."""
        ExpandInt4(weight_only)(model)

    def prepare(self, graph: ExportedGraph, folder: Path, options: BuildOptions) -> Path:
        """The canonical graph with INT4 expanded."""
        return prepare_graph(graph, folder, self.prepare_model)

    def compile(self, request: CompileRequest) -> Compiled:
        """Moves the prepared files into the engine, loads them, and learns from one profiled run what computes what."""
        files = []
        for path in (request.onnx_path, Path(f"{request.onnx_path}.data")):
            if path.exists():
                shutil.move(path, request.folder / path.name)
                files.append(path.name)
        options = _options(str(request.options.hint))
        options.enable_profiling = True
        options.profile_file_prefix = str(request.scratch / "onnxruntime")
        session = _session(str(request.folder / request.onnx_path.name), options)
        session.run(None, request.example)
        trace = Path(session.end_profiling())
        return Compiled(tuple(files), self.environment(), compute_types(json.loads(trace.read_text(encoding="utf-8"))))

    def load(
        self, engine: Engine, files: Mapping[str, bytearray], bound: Mapping[str, NDArray[Any]]
    ) -> OnnxRuntimeRunner:
        """A session from the verified bytes: ONNX Runtime opens no file."""
        models = [name for name in files if name.endswith(".onnx")]
        if len(models) != 1:
            raise IntegrityError(f"{engine.folder} must hold one ONNX file, it names {len(models)}: build it again")
        data = {name: content for name, content in files.items() if name != models[0]}
        check_external_bytes(files[models[0]], {name: len(content) for name, content in data.items()})
        options = _options(engine.hint)
        options.add_external_initializers_from_files_in_memory(
            list(data), list(data.values()), [len(content) for content in data.values()]
        )
        return OnnxRuntimeRunner(_session(bytes(files[models[0]]), options), bound)

    def runner_from_model(self, model: onnx.ModelProto, hint: str) -> Runner:
        """A session of a model in memory."""
        return OnnxRuntimeRunner(_session(model.SerializeToString(), _options(hint)), {})


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
    if hint == "fast":
        options.graph_optimization_level = levels.ORT_ENABLE_ALL
        # else weight-only products code their activations as INT8 behind the graph's back
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    else:
        options.graph_optimization_level = levels.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
        options.use_deterministic_compute = True
    options.log_severity_level = _FEW_WARNINGS
    return options


def _session(model: str | bytes, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    import onnxruntime

    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
