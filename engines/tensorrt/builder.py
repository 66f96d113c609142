"""Builds a plan from an ONNX file, with Polygraphy.

The compiler can crash, so this only ever runs in a child process: inside a build's own, or as
``python -m s2p_deploy.engines.tensorrt.builder request.json result.json``.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


def build_plan(library: str, onnx_path: Path, shapes: Shapes, out: Path) -> None:
    """Writes the serialized engine of a strongly typed graph.

    Args:
        library: ``tensorrt`` or ``tensorrt_rtx``.
        onnx_path: the prepared graph, its external data beside it.
        shapes: smallest, tuned-for and largest shape of every input.
        out: file to write.

    Raises:
        PolygraphyException: the parser or the builder refused the graph; its log says why.
    """
    if library == "tensorrt_rtx":
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"  # read when polygraphy is imported
    from polygraphy.backend.trt import CreateConfig, EngineBytesFromNetwork, NetworkFromOnnxPath, Profile

    trt = importlib.import_module(library)
    profile = Profile()
    for name, (smallest, tuned, largest) in shapes.items():
        profile.add(name, min=smallest, opt=tuned, max=largest)
    config = CreateConfig(profiles=[profile], profiling_verbosity=trt.ProfilingVerbosity.DETAILED)
    # strongly typed: every precision is the graph's, none is chosen by the builder
    network = NetworkFromOnnxPath(str(onnx_path), strongly_typed=True)
    out.write_bytes(EngineBytesFromNetwork(network, config)())


def main(request_file: str, result_file: str) -> None:
    """Reads the request, builds, writes an empty result."""
    request: dict[str, Any] = json.loads(Path(request_file).read_text(encoding="utf-8"))
    shapes: Shapes = {n: (tuple(low), tuple(tuned), tuple(top)) for n, (low, tuned, top) in request["shapes"].items()}
    build_plan(request["library"], Path(request["onnx"]), shapes, Path(request["out"]))
    Path(result_file).write_text("{}", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
