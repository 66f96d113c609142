"""Builds a plan from an ONNX file, with Polygraphy.

The compiler can crash, so this only ever runs in a child process.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2p_deploy.engines.machine import use_gpu
from s2p_deploy.engines.tensorrt.targets import set_capabilities
from s2p_deploy.errors import MissingEnvironmentError

if TYPE_CHECKING:
    from types import ModuleType

    import tensorrt_rtx as trt

    from s2p_deploy.engines.options import Shapes


@dataclass(frozen=True)
class PlanOptions:
    """Options of a plan.

    Refittable, without weights, the file of timings to read and extend, and compute capabilities such as ``7.5`` that
    it is for (empty: the library's default).
    """

    refit: bool = False
    stripped: bool = False
    timing_cache: str | None = None
    compute_capabilities: tuple[str, ...] = ()


def build_plan(library: str, onnx_path: Path, shapes: Shapes, out: Path, options: PlanOptions | None = None) -> None:
    """Writes the serialized engine of a strongly typed graph.

    Args:
        library: ``tensorrt`` or ``tensorrt_rtx``.
        onnx_path: the prepared graph, its external data beside it.
        shapes: smallest, tuned-for and largest shape of every input.
        out: file to write.
        options: refitting, timings and targets (None: none of them).

    Raises:
        MissingEnvironmentError: this version of the library cannot do what ``options`` ask for.
        PolygraphyException: the parser or the builder refused the graph; its log says why.
    """
    if library == "tensorrt_rtx":
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"  # read when polygraphy is imported
    from polygraphy.backend.trt import (
        CreateConfig,
        EngineBytesFromNetwork,
        NetworkFromOnnxPath,
        PostprocessConfig,
        Profile,
    )

    module = importlib.import_module(library)
    chosen = options or PlanOptions()
    flags = build_flags(module, refit=chosen.refit, stripped=chosen.stripped)
    profile = Profile()
    for name, (smallest, tuned, largest) in shapes.items():
        profile.add(name, min=smallest, opt=tuned, max=largest)

    timings = chosen.timing_cache
    config = CreateConfig(
        profiles=[profile],
        profiling_verbosity=module.ProfilingVerbosity.DETAILED,
        load_timing_cache=timings if timings and Path(timings).is_file() else None,
    )
    # strongly typed: every precision is the graph's, none is chosen by the builder
    network = NetworkFromOnnxPath(str(onnx_path), strongly_typed=flags.request_strongly_typed)

    def complete(_builder: trt.Builder, _network: trt.INetworkDefinition, made: trt.IBuilderConfig) -> None:
        for name in flags.builder:
            made.set_flag(getattr(module.BuilderFlag, name))
        set_capabilities(module, made, chosen.compute_capabilities)

    build = EngineBytesFromNetwork(network, PostprocessConfig(config, complete), save_timing_cache=timings)
    out.write_bytes(build())


def build_in_child(message: dict[str, Any]) -> dict[str, Any]:
    """Builds the plan of a message in a child process, on its device; the result is the file."""
    use_gpu(message.get("device", "auto"))
    shapes: Shapes = {n: (tuple(low), tuple(tuned), tuple(top)) for n, (low, tuned, top) in message["shapes"].items()}
    options = PlanOptions(**message.get("options", {}))
    build_plan(message["library"], Path(message["onnx"]), shapes, Path(message["out"]), options)
    return {}


@dataclass(frozen=True)
class BuildFlags:
    """Builder flags to set by name, and whether strong typing must be requested (TensorRT 11 has nothing else)."""

    request_strongly_typed: bool
    builder: tuple[str, ...]


def build_flags(library: ModuleType, *, refit: bool, stripped: bool) -> BuildFlags:
    """Chooses the flags of a build with ``library``, the imported module.

    Refittable plans are always ``REFIT_IDENTICAL``: with plain ``REFIT``, TensorRT 11.3 may drop the bias of a matrix
    product even where nothing is refitted.

    Raises:
        MissingEnvironmentError: this version has no such flag.
    """
    requested = {"REFIT_IDENTICAL": refit or stripped, "STRIP_PLAN": stripped}
    wanted = tuple(name for name, is_requested in requested.items() if is_requested)
    for name in wanted:
        if not hasattr(library.BuilderFlag, name):
            raise MissingEnvironmentError(
                f"{library.__name__} {library.__version__} has no {name}: install a newer one, or build without"
            )
    networks = getattr(library, "NetworkDefinitionCreationFlag", None)
    return BuildFlags(hasattr(networks, "STRONGLY_TYPED"), wanted)
