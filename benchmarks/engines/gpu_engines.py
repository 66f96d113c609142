"""INT8 against FP16 engines on an NVIDIA GPU, through everything that executes there.

    python -m benchmarks.engines.gpu_engines --int8 GRAPH --fp16 GRAPH [--work build/gpu] [--batch 2] [--steps 50]

Both graphs are fp16 exports of one pipeline, of a quantizing recipe and of ``fp``: at Stable Diffusion v1-4's size,
those that ``full_size/engines.py`` builds from. Builds both with TensorRT, TensorRT-RTX and ONNX Runtime's execution
providers, those that run here, and times their steps by turns with all tensors on the GPU. Writes JSON; where nothing
runs, it says what is missing and exits 4. It has not been run yet: no figure of it is published.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from s2p_deploy.engines import BuildOptions, ShapeProfile, backend_by_name, build_engine, load_engine
from s2p_deploy.engines.backend import example_inputs
from s2p_deploy.engines.runner import TensorRunner
from s2p_deploy.errors import S2PError
from s2p_deploy.records import Engine, ExportedGraph

if TYPE_CHECKING:
    from collections.abc import Callable

WAYS: tuple[tuple[str, str | None], ...] = (
    ("tensorrt", None),
    ("tensorrt_rtx", None),
    ("onnxruntime", "cuda"),
    ("onnxruntime", "tensorrt"),
    ("onnxruntime", "nv_tensorrt_rtx"),
)
WARM_UP = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--int8", type=Path, required=True)
    parser.add_argument("--fp16", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/gpu"))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "gpu_engines.json")
    asked = parser.parse_args()
    missing = {name_of(way): reason for way in WAYS if (reason := what_is_missing(*way)) is not None}
    for way, reason in missing.items():
        print(f"{way}: {reason}", file=sys.stderr)
    runs = [way for way in WAYS if name_of(way) not in missing]
    if not runs:
        print("nothing here executes on an NVIDIA GPU: nothing was measured", file=sys.stderr)
        return 4
    graphs = {"int8": ExportedGraph.open(asked.int8), "fp16": ExportedGraph.open(asked.fp16)}
    found = {name_of(way): measure(way, graphs, asked) for way in runs}
    result = {"device": device(), "batch": asked.batch, "steps": asked.steps, "engines": found, "not_tried": missing}
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    return 0


def name_of(way: tuple[str, str | None]) -> str:
    backend, provider = way
    return backend if provider is None else f"{backend}:{provider}"


def what_is_missing(backend: str, provider: str | None) -> str | None:
    """Why a backend cannot run here on a provider; None where it can."""
    able = backend_by_name(backend).capabilities()
    if able.missing is not None:
        return able.missing
    if provider is not None:
        return able.unavailable.get(provider)
    return None if able.executes else "it finds no GPU here that it runs on"


def device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "not known to PyTorch"


def measure(way: tuple[str, str | None], graphs: dict[str, ExportedGraph], asked: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step of both engines; what fails is the answer too."""
    backend, provider = way
    options = BuildOptions(provider=provider, profile=ShapeProfile(1, asked.batch, max(asked.batch, 4)))
    try:
        engines = {
            kind: build_engine(
                graph,
                asked.work / f"{name_of(way).replace(':', '-')}-{kind}",
                backend=backend,
                options=options,
                replace=True,
            )
            for kind, graph in graphs.items()
        }
        times = by_turns(engines, graphs, asked)
    except S2PError as error:
        return {"failed": str(error).partition("\n")[0]}
    figures: dict[str, Any] = {kind: figures_of(engines[kind], seconds) for kind, seconds in times.items()}
    return figures | {"int8_over_fp16": figures["int8"]["p50_ms"] / figures["fp16"]["p50_ms"]}


def by_turns(
    engines: dict[str, Engine], graphs: dict[str, ExportedGraph], asked: argparse.Namespace
) -> dict[str, list[float]]:
    runners = {kind: load_engine(engine) for kind, engine in engines.items()}
    steps = {kind: step_of(runners[kind], graphs[kind], asked.batch) for kind in runners}
    times: dict[str, list[float]] = {kind: [] for kind in runners}
    for turn in range(WARM_UP + asked.steps):
        for kind, step in steps.items():
            start = time.perf_counter()
            step()
            if turn >= WARM_UP:
                times[kind].append(time.perf_counter() - start)
    for runner in runners.values():
        runner.close()
    return times


def step_of(runner: Any, graph: ExportedGraph, batch: int) -> Callable[[], None]:  # noqa: ANN401 - either kind
    """One step, done when it returns; without a way through the host where the runner can."""
    import torch

    names = ("sample", "timestep_index", "encoder_hidden_states")
    example = example_inputs(graph, ShapeProfile(1, batch, batch))
    inputs = {name: value for name, value in example.items() if name in names}
    on_gpu = torch.cuda.is_available() and isinstance(runner, TensorRunner)
    tensors = {
        n: torch.from_numpy(v).to("cuda" if on_gpu and n != "timestep_index" else "cpu") for n, v in inputs.items()
    }

    def step() -> None:
        if on_gpu:
            runner.infer_tensors(tensors)
            torch.cuda.synchronize()
        else:
            runner.infer(inputs)

    return step


def figures_of(engine: Engine, seconds: list[float]) -> dict[str, Any]:
    compute = [layer.compute for layer in engine.layers]
    return {
        "p50_ms": round(float(np.median(seconds)) * 1e3, 3),
        "p95_ms": round(float(np.quantile(seconds, 0.95)) * 1e3, 3),
        "engine_mb": round(sum(engine.manifest.content["sizes"].values()) / 1e6, 1),
        "build_seconds": engine.manifest.content["build_seconds"],
        "layers_by_compute": {kind: compute.count(kind) for kind in sorted(set(compute))},
        "environment": engine.environment,
    }


if __name__ == "__main__":
    sys.exit(main())
