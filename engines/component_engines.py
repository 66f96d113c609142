"""Text encoders and autoencoder of a pipeline on a backend: exported, written as an artifact, and loaded from it."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2p_deploy.context import Context
from s2p_deploy.engines.backend import resolve_execution, usable_backend
from s2p_deploy.engines.load import check_environment
from s2p_deploy.engines.onnx_files import check_external_bytes
from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.records import Execution, check_vacant, write_artifact
from s2p_deploy.records.artifacts import read_verified
from s2p_deploy.records.engine import ComponentEngines
from s2p_deploy.records.files import check_room

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import onnx_ir as ir
    import onnxruntime

    from s2p_deploy.context import Progress
    from s2p_deploy.engines.runner import Runner
    from s2p_deploy.families import BasePipeline
    from s2p_deploy.records.engine import ComponentEngine

_BACKENDS = ("onnxruntime", "openvino")
_SAME_BITS_EVERYWHERE = "reference"  # the optimization whose results do not depend on the number of cores
_ERRORS_ONLY = 3


def build_component_engines(
    base: BasePipeline,
    out: Path,
    *,
    backend: str,
    execution: Execution | None = None,
    replace: bool = False,
    context: Context = Context(),
) -> ComponentEngines:
    """Writes a pipeline's text encoders and autoencoder for a backend, in floating point, one network after the other.

    Args:
        base: the pipeline.
        out: folder of the artifact.
        backend: onnxruntime or openvino.
        execution: how they run (None: the backend's defaults).
        replace: whether an artifact at ``out`` may be replaced.
        context: its ``progress`` is told about every tensor written.

    Raises:
        InputError: ``out`` exists, its disk has no room, the backend runs no such networks or not so, or a network
            is of a class that is not supported.
        MissingEnvironmentError: the backend's library is missing.
    """
    from s2p_deploy.families.components import component_networks

    check_vacant(out, replace=replace)
    if backend not in _BACKENDS:
        raise InputError(f"{backend} runs no text encoders and autoencoders: use one of {', '.join(_BACKENDS)}")
    runs = usable_backend(backend)
    resolved = resolve_execution(runs, execution or Execution(), "fp32")
    check_room(out, 2 * _weight_bytes(base))

    def fill(folder: Path) -> dict[str, Any]:
        names = component_networks(base)
        networks = {name: _write_network(base, name, backend, folder, context.progress) for name in names}
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
        about = {"backend": backend, **asdict(resolved), "environment": runs.environment(resolved)}
        return about | {"networks": networks, "sizes": sizes}

    write_artifact(out, kind="ComponentEngines", base=base.base, recipe={}, fill=fill, replace=replace)
    return ComponentEngines.open(out)


def load_component_engines(engines: ComponentEngines) -> dict[str, Runner]:
    """Loads a runner of every network, by name; the bytes that are loaded are those that were hashed.

    Raises:
        IntegrityError: a file was changed, or is none that the backend reads.
        MissingEnvironmentError: the library is missing or of another version.
        InputError: there is no such backend.
    """
    if engines.backend not in _BACKENDS:
        raise InputError(f"{engines.folder} is for {engines.backend}: only {', '.join(_BACKENDS)} run such networks")
    check_environment(engines, usable_backend(engines.backend))
    return {name: _loaded(engines, network) for name, network in engines.networks.items()}


def _write_network(base: BasePipeline, name: str, backend: str, folder: Path, progress: Progress) -> dict[str, Any]:
    """Exports one network into ``folder``; what the manifest says of it."""
    with tempfile.TemporaryDirectory(prefix=".onnx-", dir=folder) as scratch:
        file = Path(scratch) / f"{name}.onnx"
        described = _write_onnx(base, name, file, progress)
        files = _as_ir(file, folder) if backend == "openvino" else _moved(file, folder)
    return described | {"files": files}


def _write_onnx(base: BasePipeline, name: str, file: Path, progress: Progress) -> dict[str, Any]:
    """PyTorch's weights are freed when it returns."""
    from s2p_deploy.export.float_networks import component_model
    from s2p_deploy.export.tensors import write_model
    from s2p_deploy.families.components import load_component

    component = load_component(base, name)
    model = component_model(component, name)
    given, made = _specs(model.graph.inputs), _specs(model.graph.outputs)
    write_model(model, file, progress, f"write {file.stem}")
    return {"input": given[0], "outputs": made, "config": component.config}


def _moved(file: Path, folder: Path) -> list[str]:
    files = [path for path in (file, Path(f"{file}.data")) if path.exists()]
    for path in files:
        shutil.move(path, folder / path.name)
    return [path.name for path in files]


def _as_ir(file: Path, folder: Path) -> list[str]:
    import openvino

    names = [f"{file.stem}.xml", f"{file.stem}.bin"]
    # serialize, not save_model: that one rounds float32 weights to float16
    openvino.serialize(openvino.Core().read_model(file), *(folder / name for name in names))
    return names


def _specs(values: Iterable[ir.Value]) -> list[dict[str, Any]]:
    """Name, type and shape, JSON-ready; sizes that vary have names."""
    specs = []
    for value in values:
        assert value.dtype is not None, "traced with its type"
        assert value.shape is not None, "traced with its shape"
        shape = [size if isinstance(size, int) else str(size) for size in value.shape]
        specs.append({"name": value.name, "dtype": value.dtype.numpy().name, "shape": shape})
    return specs


def _weight_bytes(base: BasePipeline) -> int:
    """Sums the networks besides the denoiser as the pipeline stores them: half of what is written, where in float16."""
    folders = {path.parent for path in base.folder.glob("*/*.safetensors")} - {base.denoiser_folder}
    return sum(path.stat().st_size for folder in folders for path in folder.glob("*.safetensors"))


def _loaded(engines: ComponentEngines, network: ComponentEngine) -> Runner:
    files = {name: read_verified(engines, name) for name in network.files}
    model = bytes(files.pop(network.files[0]))
    try:
        return (
            _openvino(model, files, engines.execution)
            if engines.backend == "openvino"
            else _onnx(model, files, engines.execution)
        )
    except IntegrityError:
        raise
    except Exception as error:  # the runtimes' errors have no class of their own in common
        path = engines.folder / network.files[0]
        raise IntegrityError(
            f"{path} cannot be loaded ({type(error).__name__}): build the component engines again"
        ) from error


def _onnx(model: bytes, data: Mapping[str, bytearray], execution: Execution) -> Runner:
    from s2p_deploy.engines.onnxruntime.providers import PROVIDERS, gpu_session
    from s2p_deploy.engines.onnxruntime.runners import OnnxRuntimeRunner

    check_external_bytes(model, {name: len(content) for name, content in data.items()})
    options = _session_options(data, execution)
    if execution.provider in PROVIDERS:
        return OnnxRuntimeRunner(gpu_session(model, options, execution.provider, None), {})
    import onnxruntime

    return OnnxRuntimeRunner(onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]), {})


def _session_options(data: Mapping[str, bytearray], execution: Execution) -> onnxruntime.SessionOptions:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    if execution.optimization == _SAME_BITS_EVERYWHERE:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
    if data:
        sizes = [len(content) for content in data.values()]
        options.add_external_initializers_from_files_in_memory(list(data), list(data.values()), sizes)
    return options


def _openvino(model: bytes, data: Mapping[str, bytearray], execution: Execution) -> Runner:
    import numpy as np
    import openvino

    from s2p_deploy.engines.openvino.backend import OpenVinoRunner

    if len(data) != 1:
        raise IntegrityError("an OpenVINO network needs its weights in one file: build the component engines again")
    weights = np.frombuffer(next(iter(data.values())), np.uint8)
    shared = openvino.Tensor(weights, shared_memory=True)
    return OpenVinoRunner(openvino.Core().read_model(model=model, weights=shared), execution, {}, weights=weights)
