"""The child process of a build: ``python -m s2p_deploy.engines.child request.json result.json``."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from s2p_deploy.engines.backend import CompileRequest, example_inputs, usable_backend
from s2p_deploy.engines.isolation import answer_request
from s2p_deploy.engines.lowerings import MIXED_ROWS, RECORDED
from s2p_deploy.engines.options import BuildOptions
from s2p_deploy.engines.prepare import backend_lowerings, prepared_inputs
from s2p_deploy.engines.site_report import site_precisions, storage_bits
from s2p_deploy.records import ExportedGraph


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Prepares and compiles: writes the backend's files to ``request["folder"]`` and returns what it learned."""
    started = time.monotonic()
    backend = usable_backend(request["backend"])
    graph = ExportedGraph.open(Path(request["graph"]))
    scratch = Path(request["scratch"])
    options = BuildOptions.from_json(request["options"])
    lowerings = backend_lowerings(graph, backend.name, options)
    prepared = backend.prepare(graph, scratch, options)
    inputs = prepared_inputs(graph, prepared)
    example = example_inputs(graph, options.profile)
    storage = storage_bits(prepared)  # before compile, which may move the file
    if graph.text:
        storage |= storage_bits(graph.text_file)
    compiled = backend.compile(
        CompileRequest(
            onnx_path=prepared,
            inputs=inputs,
            options=options,
            folder=Path(request["folder"]),
            scratch=scratch,
            example={spec.name: example[spec.name] for spec in inputs},
        )
    )
    return {
        "engine_files": list(compiled.files),
        "environment": compiled.environment,
        "inputs": [asdict(spec) for spec in inputs],
        "sites": [asdict(site) for site in site_precisions(graph, lowerings, storage, compiled.compute)],
        RECORDED: lowerings.by_point,
        MIXED_ROWS: lowerings.mixed_rows,
        "notes": compiled.notes,
        "build_seconds": round(time.monotonic() - started, 3),
        "peak_rss_bytes": peak_rss(),
    }


def peak_rss() -> int:
    """Largest resident size of this process in bytes (getrusage would count the parent's too, from before exec)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    answer_request(sys.argv[1], sys.argv[2], build)
