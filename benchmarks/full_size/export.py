"""Export at full size, random weights: seconds, peak memory and size of the graph, one export per process.

    python -m benchmarks.full_size.stream sdxl w4a8        # and fp: what is exported
    python -m benchmarks.full_size.export sdxl w4a8 [--work build/full_size] [--dtype fp16] [--sizes dynamic]

Writes ``WORK/sdxl/graph-w4a8-fp16`` (``-dynamic``, ``-text``: its options) from ``WORK/sdxl/model-w4a8``, and its
figures into ``results/full_size_export.json``.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.full_size.pipeline import MODELS
from s2p_deploy.export import export_graph
from s2p_deploy.records import CalibratedModel, ExportedGraph


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", choices=MODELS)
    parser.add_argument("form", choices=("fp", "w8a8", "w4a8"))
    parser.add_argument("--dtype", choices=("fp32", "fp16"), default="fp16")
    parser.add_argument("--sizes", choices=("fixed", "dynamic"), default="fixed")
    parser.add_argument("--text", choices=("graph", "input"), default="graph", help="--text-projections")
    parser.add_argument("--work", type=Path, default=Path("build/full_size"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "full_size_export.json")
    asked = parser.parse_args()
    forms = {"dtype": asked.dtype, "sizes": asked.sizes, "text_projections": asked.text}
    out = graph_name(asked.form, asked.dtype, sizes=asked.sizes, text="text" if asked.text == "input" else "")
    found = measure(asked.work / asked.original, asked.form, out, forms)
    known = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.exists() else {}
    known[asked.original] = known.get(asked.original, {}) | {out.removeprefix("graph-"): found}
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


def graph_name(form: str, dtype: str, *, sizes: str = "fixed", text: str = "") -> str:
    """The folder of a graph in a family's work folder."""
    return "-".join(("graph", form, dtype, *(part for part in (text, sizes.removeprefix("fixed")) if part)))


def measure(work: Path, form: str, name: str, forms: dict[str, Any]) -> dict[str, Any]:
    """Exports one form as ``work/name``; the check of the calibrated model's own bytes is timed apart."""
    before, start = peak_gb(), time.perf_counter()
    model = CalibratedModel.open(work / f"model-{form}")
    opened = time.perf_counter()
    used = time.process_time()
    graph = export_graph(model, work / name, **forms, replace=True)
    return {
        "seconds": round(time.perf_counter() - opened, 1),
        "processor_seconds": round(time.process_time() - used, 1),
        "threads": torch.get_num_threads(),
        "seconds_to_verify_the_model": round(opened - start, 1),
        "peak_memory_gb": round(peak_gb(), 2),
        "peak_memory_before_gb": round(before, 2),
        "layers": len(graph.layers),
    } | gigabytes(graph, model)


def gigabytes(graph: ExportedGraph, model: CalibratedModel) -> dict[str, float]:
    """Of the denoiser's graph, of the constant time table in it, and of the conditioning graph."""
    slices = model.manifest.content["time_slices"].values()
    rows = 0 if model.added_width else len(graph.timesteps.angle)
    values = rows * max(stop for _, stop in slices)
    return {
        "denoiser_gb": _gb(graph, "denoiser.onnx"),
        "time_table_gb": round(values * {"fp32": 4, "fp16": 2}[graph.dtype] / 1e9, 3),
        "conditioning_gb": _gb(graph, "conditioning.onnx"),
    }


def _gb(graph: ExportedGraph, prefix: str) -> float:
    return round(sum(file.stat().st_size for file in graph.folder.glob(f"{prefix}*")) / 1e9, 3)


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main()
