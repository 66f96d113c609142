"""Builds a plan from an ONNX file, with Polygraphy.

The compiler can crash, so this only ever runs in a child process: inside a build's own, or as
``python -m s2p_deploy.engines.tensorrt.builder request.json result.json``.
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2p_deploy.engines.isolation import answer_request
from s2p_deploy.engines.tensorrt.versions import build_flags

if TYPE_CHECKING:
    from types import ModuleType

    import tensorrt_rtx as trt

    from s2p_deploy.engines.profile_shapes import Shapes


@dataclass(frozen=True)
class PlanOptions:
    """Whether the plan can be refitted, whether it holds its weights, and the file of timings to read and extend."""

    refit: bool = False
    stripped: bool = False
    timing_cache: str | None = None


def build_plan(library: str, onnx_path: Path, shapes: Shapes, out: Path, options: PlanOptions | None = None) -> None:
    """Writes the serialized engine of a strongly typed graph.

    Args:
        library: ``tensorrt`` or ``tensorrt_rtx``.
        onnx_path: the prepared graph, its external data beside it.
        shapes: smallest, tuned-for and largest shape of every input.
        out: file to write.
        options: refitting and timings (None: neither).

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
    network = NetworkFromOnnxPath(str(onnx_path), strongly_typed=flags.ask_strongly_typed)
    flagged = PostprocessConfig(config, lambda _builder, _network, made: _set_flags(module, made, flags.builder))
    build = EngineBytesFromNetwork(network, flagged, save_timing_cache=timings)
    out.write_bytes(build())


def _set_flags(library: ModuleType, config: trt.IBuilderConfig, names: tuple[str, ...]) -> None:
    for name in names:
        config.set_flag(getattr(library.BuilderFlag, name))


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Builds what is asked for; the result is the file."""
    shapes: Shapes = {n: (tuple(low), tuple(tuned), tuple(top)) for n, (low, tuned, top) in request["shapes"].items()}
    options = PlanOptions(**request.get("options", {}))
    build_plan(request["library"], Path(request["onnx"]), shapes, Path(request["out"]), options)
    return {}


if __name__ == "__main__":
    answer_request(sys.argv[1], sys.argv[2], answer)
