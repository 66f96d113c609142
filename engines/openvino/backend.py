"""OpenVINO, CPU device. The engine is an IR, ``denoiser.xml`` and ``denoiser.bin``, its weights as the graph's.

Precision ``f32`` (the default) computes what is not INT8 in float32, for parity; ``bf16`` is faster on processors with
bf16 instructions, and OpenVINO's own default there.
"""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.engines.backend import Capabilities, Compiled
from s2p_deploy.engines.lowerings import apply_passes, int4_rule, weight_only
from s2p_deploy.engines.machine import installed_version, int8_products_overflow, platform_name
from s2p_deploy.engines.onnx_files import write_onnx
from s2p_deploy.engines.openvino.ir import IrSubgraphs, compute_types, product_names
from s2p_deploy.engines.options import shape_at
from s2p_deploy.engines.passes.padded_heads import PaddedHeads
from s2p_deploy.engines.passes.scaled_queries import ScaledQueries
from s2p_deploy.engines.passes.split_linears import SplitLinears
from s2p_deploy.engines.runner import ClosingRunner
from s2p_deploy.engines.support import support_of
from s2p_deploy.errors import IntegrityError
from s2p_deploy.records import Execution
from s2p_deploy.records.artifacts import verified_files

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx_ir as ir
    import openvino
    from numpy.typing import NDArray

    from s2p_deploy.engines.backend import CompileRequest
    from s2p_deploy.engines.lowerings import Lowerings
    from s2p_deploy.engines.options import Shape, Shapes
    from s2p_deploy.engines.runner import Runner
    from s2p_deploy.engines.subgraphs import Subgraphs
    from s2p_deploy.records import Engine, ExportedGraph

XML, BIN = "denoiser.xml", "denoiser.bin"
_MAKING_CORE = Lock()


@dataclass(frozen=True)
class OpenVinoBackend:
    """OpenVINO as a backend."""

    name: str

    def capabilities(self) -> Capabilities:
        """Runs wherever it is installed."""
        version = installed_version("openvino")
        missing = None if version else "OpenVINO is not installed: pip install 's2p-deploy[openvino]'"
        return Capabilities(
            self.name, version, missing, version is not None, ("fp32", "fp16"), precisions=("f32", "bf16")
        )

    def targets(self) -> tuple[str, ...]:
        """There is no choice."""
        return ()

    def environment(self, execution: Execution | None = None, device: str = "auto") -> dict[str, str]:
        """Library version, device and platform."""
        return {"openvino": str(self.capabilities().version), "device": "cpu", "platform": platform_name()}

    def prepare_model(self, model: ir.Model, lowerings: Lowerings, execution: Execution) -> None:
        """Applies the chosen lowerings, splits gated layers and, in bfloat16, writes attention as its kernel likes it.

        Expands INT4 weights beside quantized activations: packed, OpenVINO uses f32.
        """
        keep = int4_rule(support_of(self.name), lowerings, wanted=weight_only, untried=weight_only)
        apply_passes(model, lowerings, keep)
        SplitLinears()(model)
        if execution.precision == "bf16":
            PaddedHeads()(model)
            ScaledQueries()(model)

    def compile(self, request: CompileRequest) -> Compiled:
        """Writes the IR, compiles it once, and reads per layer what runs in which type (known after a first run)."""
        import openvino

        core = _core()
        onnx_path = request.scratch / "denoiser.onnx"  # OpenVINO reads large models from files alone
        write_onnx(request.model, onnx_path)
        model = core.read_model(onnx_path)
        # serialize, not save_model: that one rounds float32 weights to float16
        openvino.serialize(model, request.folder / XML, request.folder / BIN)
        compiled = _compiled(_for_inputs(model, request.example), request.options.execution)
        compiled(request.example)
        names = product_names(request.model)
        notes = {"processor": core.get_property("CPU", "FULL_DEVICE_NAME")}
        return Compiled((XML, BIN), self.environment(), compute_types(compiled.get_runtime_model(), names), notes)

    def load(
        self,
        engine: Engine,
        files: Mapping[str, bytearray],
        bound: Mapping[str, NDArray[Any]],
        device: str = "auto",
    ) -> OpenVinoRunner:
        """Reads the verified bytes: OpenVINO opens no file."""
        model, weights = _model_of(files[XML], files[BIN])
        sizes = engine.profile.sizes("optimum")
        tuned = {spec.name: shape_at(spec, sizes) for spec in engine.inputs if spec.name not in bound}
        return OpenVinoRunner(model, engine.execution, bound, tuned, weights)

    def write_network(
        self, onnx_file: Path, folder: Path, shapes: Shapes, execution: Execution, device: str = "auto"
    ) -> Compiled:
        """Writes the network's IR."""
        import openvino

        names = (f"{onnx_file.stem}.xml", f"{onnx_file.stem}.bin")
        # serialize, not save_model: that one rounds float32 weights to float16
        openvino.serialize(_core().read_model(onnx_file), *(folder / name for name in names))
        return Compiled(names, self.environment(execution), {})

    def load_network(self, files: Mapping[str, bytearray], execution: Execution, device: str = "auto") -> Runner:
        """Reads the verified bytes; the weights lie in one file."""
        if len(files) != 2:
            raise IntegrityError("an OpenVINO network needs its weights in one file: build the component engines again")
        model, weights = _model_of(*files.values())
        return OpenVinoRunner(model, execution, {}, weights=weights)

    def runner_from_model(self, model: ir.Model, execution: Execution) -> Runner:
        """Opens a model; OpenVINO reads large ones from files alone."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "subgraph.onnx"
            write_onnx(model, path)
            return OpenVinoRunner(_core().read_model(path), execution, {})

    def subgraphs(self, engine: Engine, graph: ExportedGraph, scratch: Path) -> Subgraphs:
        """Opens the engine's IR."""
        files = verified_files(engine)
        model, weights = _model_of(files[XML], files[BIN])

        def running(subgraph: openvino.Model) -> Runner:
            return OpenVinoRunner(subgraph, engine.execution, {}, weights=weights)

        return IrSubgraphs(model, running)


class OpenVinoRunner(ClosingRunner):
    """Runner of a model, compiled when first called: for fixed ``tuned`` shapes, and once for all others.

    Fixed shapes halve the time of a small denoiser (28 against 61 ms on the bundled one, batch 8), while compiling for
    every size would cost seconds and a copy of the weights each. Bound inputs are shared, not copied. ``weights`` is
    the memory that the model's constants point into: OpenVINO does not keep it alive.
    """

    def __init__(
        self,
        model: openvino.Model,
        execution: Execution,
        bound: Mapping[str, NDArray[Any]],
        tuned: Mapping[str, Shape] | None = None,
        weights: NDArray[np.uint8] | None = None,
    ) -> None:
        self._model: openvino.Model | None = model
        self._execution = execution
        self._bound = {name: np.ascontiguousarray(value) for name, value in bound.items()}
        self._tuned = [] if tuned is None else [dict(tuned)]
        self._weights = weights
        self._requests: dict[int | None, openvino.InferRequest] = {}  # by which of the tuned shapes; None: any
        self._outputs = [output.get_any_name() for output in model.outputs]

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Returns all outputs of the graph."""
        if self._model is None:
            raise ValueError("the runner is closed")
        shapes = {name: value.shape for name, value in inputs.items()}
        tuned = self._tuned.index(shapes) if shapes in self._tuned else None
        if tuned not in self._requests:
            shaped = self._model if tuned is None else _for_inputs(self._model, {**inputs, **self._bound})
            self._requests[tuned] = self._request(shaped)
        request = self._requests[tuned]
        request.infer(dict(inputs))
        return {name: np.array(request.get_tensor(name).data) for name in self._outputs}

    def tune(self, shapes: Sequence[Mapping[str, Shape]]) -> None:
        """Compiles for these shapes too: seconds, side by side, and a copy of the weights for each."""
        if self._model is None:
            raise ValueError("the runner is closed")
        new = [dict(one) for one in shapes if dict(one) not in self._tuned]
        bound = {name: value.shape for name, value in self._bound.items()}
        models = [_fixed(self._model, one | bound) for one in new]
        with ThreadPoolExecutor() as pool:  # compiling leaves Python alone
            for one, request in zip(new, pool.map(self._request, models), strict=True):
                self._requests[len(self._tuned)] = request
                self._tuned.append(one)

    def rebind(self, name: str, value: NDArray[Any]) -> None:
        """Gives a bound input other values: all requests share its memory."""
        np.copyto(self._bound[name], value)

    def close(self) -> None:
        """Drops what was compiled and the model, then the weights."""
        self._requests = {}
        self._model = None
        self._weights = None

    def _request(self, model: openvino.Model) -> openvino.InferRequest:
        import openvino

        request = _compiled(model, self._execution).create_infer_request()
        for name, value in self._bound.items():
            request.set_tensor(name, openvino.Tensor(value, shared_memory=True))
        return request


def _model_of(xml: bytearray, data: bytearray) -> tuple[openvino.Model, NDArray[np.uint8]]:
    """Reads the model of verified bytes; returns it with the memory that its constants point into."""
    import openvino

    weights = np.frombuffer(data, np.uint8)
    shared = openvino.Tensor(weights, shared_memory=True)
    return _core().read_model(model=bytes(xml), weights=shared), weights


def _core() -> openvino.Core:
    """Returns the process's one core, which is never given up.

    Every core loads OpenVINO's CPU plugin anew, and every plugin gives its thread another stack for signals. One that
    is dropped puts back the stack that it found, which is unmapped where that one's plugin went before it: the next
    signal then ends the process with a segmentation fault.
    """
    with _MAKING_CORE:
        return _only_core()


@cache
def _only_core() -> openvino.Core:
    import openvino

    return openvino.Core()


def _for_inputs(model: openvino.Model, inputs: Mapping[str, NDArray[Any]]) -> openvino.Model:
    """Copies the model with the fixed shapes of ``inputs``."""
    return _fixed(model, {name: value.shape for name, value in inputs.items()})


def _fixed(model: openvino.Model, shapes: Mapping[str, Shape]) -> openvino.Model:
    fixed = model.clone()
    fixed.reshape({name: list(shape) for name, shape in shapes.items()})
    return fixed


def _compiled(model: openvino.Model, execution: Execution) -> openvino.CompiledModel:
    return _core().compile_model(model, "CPU", _properties(execution))


def _properties(execution: Execution) -> dict[str, str]:
    floating = {"LP_TRANSFORMS_MODE": "NO"} if int8_products_overflow() else {}
    return floating | {
        "INFERENCE_PRECISION_HINT": str(execution.precision),
        "PERFORMANCE_HINT": "LATENCY",
        # by default OpenVINO codes the activations of weight-only matrix products as INT8 by itself, and says f32: a
        # W4A16 UNet then agreed with ONNX Runtime to 39 dB, with 0 to 120 dB
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    }
