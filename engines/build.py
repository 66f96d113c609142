"""The build stage: ExportedGraph -> Engine. Estimates, lowers and compiles in a child process, writes one artifact."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2p_deploy.child_process import Limits
from s2p_deploy.context import Context, duration
from s2p_deploy.engines.backend import (
    CompileRequest,
    call_in_child,
    check_refit,
    check_targets,
    example_inputs,
    resolve_execution,
    usable_backend,
)
from s2p_deploy.engines.load import remember_trial
from s2p_deploy.engines.lowerings import MIXED_TIMESTEPS, RECORDED, layer_precisions, lowered_model, storage_bits
from s2p_deploy.engines.machine import peak_rss, use_gpu
from s2p_deploy.engines.model_card import CARD, engine_card
from s2p_deploy.engines.onnx_files import read_onnx
from s2p_deploy.engines.options import BuildOptions, profile_for
from s2p_deploy.engines.profile import DefaultProfile, default_profile
from s2p_deploy.errors import InputError, MissingEnvironmentError
from s2p_deploy.records import Engine, ExportedGraph, check_vacant, write_artifact
from s2p_deploy.records.artifacts import copy_verified
from s2p_deploy.records.exported_graph import CONDITIONING_FILE, CONTROL_FILE, TEXT_FILE
from s2p_deploy.records.files import available_memory, free_bytes

TIMEOUT_S = 3600.0
_ADAPTED = ("lora", "images")  # parts of a graph's content that say what adapters it takes
BASE_MEMORY = 120 * 10**6  # interpreter and libraries, before any weight
MEMORY_PER_WEIGHT_BYTE = 1.5  # least seen: the backend's copy, and the file pages that go into it
DISK_PER_WEIGHT_BYTE = 2.0  # the prepared graph and the engine, side by side until the end


def build_engine(  # noqa: PLR0913 - a build has these arguments, all but two by keyword
    graph: ExportedGraph,
    out: Path,
    *,
    backend: str,
    options: BuildOptions | None = None,
    limits: Limits | None = None,
    replace: bool = False,
    context: Context = Context(),
) -> Engine:
    """Builds the engine of a graph and writes it to ``out``. A build that fails leaves nothing behind.

    Args:
        graph: what to build from; fp16 for the TensorRT kinds.
        out: folder of the new artifact.
        backend: onnxruntime, openvino, tensorrt_rtx or tensorrt.
        options: precision, provider, optimization, batch sizes, lowering (None: the defaults).
        limits: of the build's child process: seconds of wall time (None: an hour) and bytes of private memory.
        replace: replaces an artifact at ``out``; it stays until the new one is whole.
        context: its ``progress`` is told when the build starts and ends; a GPU's builder works on its ``device``.

    Raises:
        InputError: an argument is wrong, ``out`` exists, or the graph's type is not the backend's.
        MissingEnvironmentError: the backend's library, memory or disk is missing.
        EngineBuildError: the backend failed or crashed; the message ends with its log.
    """
    limits = limits or Limits(TIMEOUT_S)
    resolved = check_build(
        graph, backend, out, options or BuildOptions(), limits, replace=replace, device=context.device
    )

    def fill(folder: Path) -> dict[str, Any]:
        context.progress("build", 0, 1)
        # on the artifact's disk, and inside of its folder, which the next writer removes where a kill leaves it
        with tempfile.TemporaryDirectory(prefix=".scratch-", dir=folder) as scratch:
            message = {
                "graph": str(graph.folder.resolve()),
                "backend": backend,
                "options": dataclasses.asdict(resolved),
                "folder": str(folder.resolve()),
                "scratch": scratch,
                "device": context.device,
            }
            compiled = call_in_child("s2p_deploy.engines.build:compile_in_child", message, limits)
        for name in graph.manifest.files:
            side_graph = name.startswith((CONDITIONING_FILE, TEXT_FILE))
            if side_graph or name in {"act_scales.safetensors", "timesteps.json", CONTROL_FILE}:
                copy_verified(graph, name, folder / name, one_link=True)
        context.progress("build", 1, 1)
        content = (
            compiled
            | {
                "sizes": {name: (folder / name).stat().st_size for name in compiled["engine_files"]},
                "backend": backend,
                **dataclasses.asdict(resolved.execution),
                "options": dataclasses.asdict(resolved),
                "dtype": graph.dtype,
                "profile": resolved.resolved_profile.to_json(),
                "outputs": [dataclasses.asdict(spec) for spec in graph.outputs],
                "quantizers": graph.manifest.content["quantizers"],
                "added_width": graph.added_width,
                "denoiser_config": graph.manifest.content["denoiser_config"],
            }
            | {part: graph.manifest.content[part] for part in _ADAPTED if part in graph.manifest.content}
        )
        (folder / CARD).write_text(engine_card(graph, content), encoding="utf-8")
        return content

    write_artifact(
        out,
        kind="Engine",
        base=graph.manifest.base,
        recipe=graph.manifest.recipe,
        fill=fill,
        parents={"graph": (graph.folder, graph.manifest)},
        replace=replace,
    )
    return remember_trial(Engine.open(out))


def check_build(  # noqa: PLR0913 - a build has these arguments, two of them by keyword
    graph: ExportedGraph,
    backend: str,
    out: Path,
    options: BuildOptions,
    limits: Limits,
    *,
    replace: bool,
    device: str = "auto",
) -> BuildOptions:
    """Refuses what :func:`build_engine` would refuse before any work; returns the options with every default filled in.

    Raises:
        InputError: an argument is wrong, ``out`` exists, or the graph's type is not the backend's.
        MissingEnvironmentError: the backend's library, memory or disk is missing.
    """
    chosen = usable_backend(backend)
    dtypes = chosen.capabilities().dtypes
    if graph.dtype not in dtypes:
        raise InputError(
            f"{backend} builds from {' or '.join(dtypes)} graphs, {graph.folder} is {graph.dtype}: export it again"
        )
    check_vacant(out, "Engine", replace=replace, inputs={"graph": graph.folder})
    execution = resolve_execution(chosen, options.execution, graph.dtype)
    profile = profile_for(graph, options.profile or default_profile(graph, chosen, execution, device).profile)
    resolved = dataclasses.replace(options, **dataclasses.asdict(execution), profile=profile)
    check_refit(chosen, resolved)
    check_targets(chosen, resolved)
    check_resources(estimate(graph, backend), out.parent, limits.memory)
    return resolved


def default_profile_of(graph: ExportedGraph, backend: str, options: BuildOptions, device: str) -> DefaultProfile:
    """Derives the batch sizes of an engine for which ``options`` name none, and says of what.

    Raises:
        InputError: the backend cannot run as the options say. MissingEnvironmentError: its library is missing.
    """
    chosen = usable_backend(backend)
    return default_profile(graph, chosen, resolve_execution(chosen, options.execution, graph.dtype), device)


def compile_in_child(message: dict[str, Any]) -> dict[str, Any]:
    """Lowers and compiles in the build's child process: writes the backend's files, returns content of the manifest."""
    started = time.monotonic()
    use_gpu(message["device"])
    backend = usable_backend(message["backend"])
    graph = ExportedGraph.open(Path(message["graph"]))
    options = BuildOptions.from_json(message["options"])
    model, lowerings = lowered_model(graph, backend, options)
    storage = storage_bits(model)
    if graph.text:
        storage |= storage_bits(read_onnx(graph.folder, TEXT_FILE, graph.manifest.files))
    left = {value.name for value in model.graph.inputs}
    inputs = tuple(spec for spec in graph.inputs if spec.name in left)
    example = example_inputs(graph, options.resolved_profile)
    compiled = backend.compile(
        CompileRequest(
            model=model,
            inputs=inputs,
            options=options,
            folder=Path(message["folder"]),
            scratch=Path(message["scratch"]),
            example={spec.name: example[spec.name] for spec in inputs},
        )
    )
    layers = layer_precisions(graph, lowerings, storage, compiled.compute)
    return {
        "engine_files": list(compiled.files),
        "environment": compiled.environment,
        "inputs": [dataclasses.asdict(spec) for spec in inputs],
        "layers": [dataclasses.asdict(layer) for layer in layers],
        RECORDED: lowerings.by_quantizer,
        MIXED_TIMESTEPS: lowerings.mixed_timesteps,
        "notes": compiled.notes,
        "build_seconds": round(time.monotonic() - started, 3),
        "peak_rss_bytes": peak_rss(),
    }


@dataclass(frozen=True)
class Cost:
    """Cost of a backend's builds as measured: memory and seconds to begin with, and per byte and GB of weights."""

    memory: int
    memory_per_byte: float
    seconds: float
    seconds_per_gb: float


_MB = 10**6
# Measured on the bundled model (4 to 17 MB of weights), quantized and not: OpenVINO 316 and 259 MB, ONNX Runtime 216
# and 167, TensorRT-RTX 779 and 686; 0.5 to 7 s. Per byte, on chains of convolutions of 89 and 354 MB: OpenVINO 2.2 to
# 2.8, ONNX Runtime 2.1; for TensorRT-RTX on SD v1-4 in fp16 (1.74 GB of weights: 5.8 GB, 17 s) and in W8A8 (0.86 GB:
# 3.6 GB, 54 s). TensorRT builds on a GPU and times kernels there; it is taken to be like TensorRT-RTX, not measured.
_RTX_FLOATING = Cost(660 * _MB, 2.8, 5.0, 4.0)
_RTX_QUANTIZED = Cost(770 * _MB, 3.1, 7.0, 46.0)
_FLOATING = {
    "onnxruntime": Cost(130 * _MB, 2.1, 1.0, 5.0),
    "openvino": Cost(220 * _MB, 2.2, 2.0, 5.0),
    "tensorrt_rtx": _RTX_FLOATING,
    "tensorrt": _RTX_FLOATING,
}
_QUANTIZED = {
    "onnxruntime": Cost(200 * _MB, 2.1, 1.0, 5.0),
    "openvino": Cost(300 * _MB, 2.8, 2.0, 5.0),
    "tensorrt_rtx": _RTX_QUANTIZED,
    "tensorrt": _RTX_QUANTIZED,
}


@dataclass(frozen=True)
class Estimate:
    """Needs of a build: the least memory and disk without which it cannot work, and the likely peak and time.

    Bytes, and seconds. Other processors and other graphs take up to a few times as long.
    """

    memory: int
    disk: int
    likely_memory: int
    likely_seconds: float

    def __str__(self) -> str:
        return (
            f"about {self.likely_memory / 1e9:.2g} GB of memory (at least {self.memory / 1e9:.2g}),"
            f" {self.disk / 1e9:.2g} GB of disk, {duration(self.likely_seconds)}"
        )


def estimate(graph: ExportedGraph, backend: str) -> Estimate:
    """Estimates the needs of building ``graph`` from the size of its weights and from other builds."""
    weights = sum(path.stat().st_size for path in graph.folder.glob("denoiser.onnx*"))
    cost = (_FLOATING if all(layer.weight is None for layer in graph.layers) else _QUANTIZED)[backend]
    least = BASE_MEMORY + int(MEMORY_PER_WEIGHT_BYTE * weights)
    return Estimate(
        memory=least,
        disk=int(DISK_PER_WEIGHT_BYTE * weights),
        likely_memory=max(least, cost.memory + int(cost.memory_per_byte * weights)),
        likely_seconds=round(cost.seconds + cost.seconds_per_gb * weights / 1e9, 1),
    )


def check_resources(needed: Estimate, folder: Path, memory_limit: int | None) -> None:
    """Refuses a build that cannot work here.

    Raises:
        InputError: ``memory_limit`` is below the least that is needed.
        MissingEnvironmentError: the machine has too little memory or disk available.
    """
    if memory_limit is not None and memory_limit < needed.memory:
        raise InputError(
            f"a memory limit of {_size(memory_limit)} is too small: this build needs at least {_size(needed.memory)}"
        )
    memory = available_memory()
    if memory is not None and memory < needed.memory:
        raise MissingEnvironmentError(
            f"the build needs at least {_size(needed.memory)} of memory, {_size(memory)} are available"
        )
    disk = free_bytes(folder)
    if disk < needed.disk:
        raise MissingEnvironmentError(
            f"the build needs {_size(needed.disk)} of disk at {folder}, {_size(disk)} are free"
        )


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
