"""OpenVINO, CPU device. The engine is an IR, ``denoiser.xml`` and ``denoiser.bin``, its weights as the graph's.

Hint ``f32`` (the default) computes what is not INT8 in float32, for parity; ``bf16`` is faster on processors with bf16
instructions, and OpenVINO's own default there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.engines.backend import Capabilities, Compiled
from s2p_deploy.engines.libraries import installed_version, platform_name
from s2p_deploy.engines.onnx_files import read_onnx
from s2p_deploy.engines.openvino.precisions import compute_types, product_names
from s2p_deploy.engines.passes.expand_int4 import ExpandInt4
from s2p_deploy.engines.prepare import prepare_graph, weight_only
from s2p_deploy.engines.runner import ClosingRunner

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx
    import onnx_ir as ir
    import openvino
    from numpy.typing import NDArray

    from s2p_deploy.engines.backend import CompileRequest
    from s2p_deploy.engines.runner import Runner
    from s2p_deploy.records import Engine, ExportedGraph

XML, BIN = "denoiser.xml", "denoiser.bin"


@dataclass(frozen=True)
class OpenVinoBackend:
    """The four verbs."""

    name: str

    def capabilities(self) -> Capabilities:
        """Runs wherever it is installed."""
        version = installed_version("openvino")
        missing = None if version else "OpenVINO is not installed: pip install 's2p-deploy[openvino]'"
        return Capabilities(self.name, version, missing, version is not None, ("fp32", "fp16"), ("f32", "bf16"))

    def environment(self) -> dict[str, str]:
        """Library version, device and platform."""
        return {"openvino": str(self.capabilities().version), "device": "cpu", "platform": platform_name()}

    def prepare_model(self, model: ir.Model) -> None:
        """Expands INT4 weights of sites with quantized activations: packed, OpenVINO would compute them in f32."""
        ExpandInt4(weight_only)(model)

    def prepare(self, graph: ExportedGraph, folder: Path) -> Path:
        """The canonical graph with INT4 expanded."""
        return prepare_graph(graph, folder, self.prepare_model)

    def compile(self, request: CompileRequest) -> Compiled:
        """Writes the IR, compiles it once, and reads per layer what runs in which type (known after a first run)."""
        import openvino

        core = openvino.Core()
        model = core.read_model(request.onnx_path)
        # serialize, not save_model: that one rounds float32 weights to float16
        openvino.serialize(model, request.folder / XML, request.folder / BIN)
        compiled = core.compile_model(model, "CPU", _properties(request.hint))
        compiled(request.example)
        names = product_names(read_onnx(request.onnx_path))
        notes = {"processor": core.get_property("CPU", "FULL_DEVICE_NAME")}
        return Compiled((XML, BIN), self.environment(), compute_types(compiled.get_runtime_model(), names), notes)

    def load(self, engine: Engine, files: Mapping[str, bytearray], bound: Mapping[str, NDArray[Any]]) -> OpenVinoRunner:
        """Compiles the verified bytes: OpenVINO opens no file."""
        import openvino

        core = openvino.Core()
        weights = np.frombuffer(files[BIN], np.uint8)
        model = core.read_model(model=bytes(files[XML]), weights=openvino.Tensor(weights, shared_memory=True))
        return OpenVinoRunner(core.compile_model(model, "CPU", _properties(engine.hint)), bound, weights)

    def runner_from_model(self, model: onnx.ModelProto, hint: str) -> Runner:
        """Compiles a model in memory."""
        import openvino

        core = openvino.Core()
        read = core.read_model(model=model.SerializeToString())
        return OpenVinoRunner(core.compile_model(read, "CPU", _properties(hint)), {})


class OpenVinoRunner(ClosingRunner):
    """A compiled model with one infer request; bound inputs are set once and shared, not copied.

    ``weights`` is the memory that the model's constants point into: OpenVINO does not keep it alive.
    """

    def __init__(
        self,
        compiled: openvino.CompiledModel,
        bound: Mapping[str, NDArray[Any]],
        weights: NDArray[np.uint8] | None = None,
    ) -> None:
        import openvino

        self._request: openvino.InferRequest | None = compiled.create_infer_request()
        self._weights = weights
        self._bound = {name: np.ascontiguousarray(value) for name, value in bound.items()}  # alive while shared
        for name, value in self._bound.items():
            self._request.set_tensor(name, openvino.Tensor(value, shared_memory=True))
        self._outputs = [output.get_any_name() for output in compiled.outputs]

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All outputs of the graph."""
        if self._request is None:
            raise ValueError("the runner is closed")
        self._request.infer(dict(inputs))
        return {name: np.array(self._request.get_tensor(name).data) for name in self._outputs}

    def close(self) -> None:
        """Drops the request and the model behind it, then the weights."""
        self._request = None
        self._weights = None


def _properties(hint: str) -> dict[str, str]:
    return {
        "INFERENCE_PRECISION_HINT": hint,
        "PERFORMANCE_HINT": "LATENCY",
        # by default OpenVINO codes the activations of weight-only matrix products as INT8 by itself, and says f32: a
        # W4A16 UNet then agreed with ONNX Runtime to 39 dB, with 0 to 120 dB
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    }
