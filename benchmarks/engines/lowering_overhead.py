"""What the lowerings of one graph cost beside each other: ``rescale`` and ``runtime_q`` against ``static``.

Engines of one graph that differ in nothing but the lowering of their activation quantizers run in turn, some steps each
a round, on the bundled UNet and on a UNet of one block of Stable Diffusion v1-4's first resolution (320 channels, 64x64
latents, random weights). Times are the process's CPU seconds on one thread, which a shared machine disturbs least, and
wall seconds; a ratio is the median of the rounds' ratios, with its quartiles. ``runtime_q`` takes one row per batch, so
all samples are on one.

    python -m benchmarks.engines.lowering_overhead [--rounds 15] [--case bundled] [--work build/lowering_overhead]

Graphs and engines that are in the work folder already (``<case>/graph``) are measured as they are.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.full_size.pipeline import SD_V1, write_pipeline
from s2p_deploy.calib import calibrate
from s2p_deploy.engines import BuildOptions, ShapeProfile, backend_by_name, build_engine, load_engine
from s2p_deploy.export import export_graph
from s2p_deploy.families import resolve_base
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import Engine, Execution, ExportedGraph, Prompt, PromptSet

if TYPE_CHECKING:
    from s2p_deploy.engines import BoundRunner

LIMIT = 1.03
CHUNK_S = 0.15  # of processor time, what one engine gets per round
ANY_COLUMN = 1e9  # every column varies by less
LOWERINGS = {
    "static": {"static_tolerance": ANY_COLUMN},
    "rescale": {"lowering": "rescale"},
    "runtime_q": {"lowering": "runtime_q"},
}
TARGETS = (
    ("onnxruntime", Execution(optimization="full")),
    ("openvino", Execution("f32")),
    ("openvino", Execution("bf16")),
)
SD_BLOCK = SD_V1 | {
    "block_out_channels": (320,),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("CrossAttnUpBlock2D",),
}


@dataclass(frozen=True)
class Case:
    """Which network (None: the bundled one), and the batch sizes that are measured."""

    unet: dict[str, Any] | None
    batches: tuple[int, ...]


CASES = {"bundled": Case(None, (2, 16)), "sd14_block": Case(SD_BLOCK, (2,))}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--work", type=Path, default=Path("build/lowering_overhead"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "lowering_overhead.json")
    asked = parser.parse_args()
    known = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.exists() else {"rows": []}
    for name in asked.case or CASES:
        graph = graph_of(name, asked.work / name)
        found = [
            {"case": name, "batch": batch, "backend": backend, "execution": str(execution)} | row
            for batch in CASES[name].batches
            for backend, execution in TARGETS
            for row in measure(graph, (backend, execution), batch, asked.rounds, asked.work / name)
        ]
        rows = [row for row in known["rows"] if row["case"] != name] + found
        known = {"limit": LIMIT, "machine": machine(), "rows": rows}
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(known, indent=1))


def machine() -> dict[str, str]:
    versions = {name: str(backend_by_name(name).capabilities().version) for name in ("onnxruntime", "openvino")}
    return {"processor": platform.machine(), "threads": "1"} | versions


def graph_of(name: str, work: Path) -> ExportedGraph:
    """The case's graph, from recipe ``ptq`` with few prompts: values do not change the time."""
    if (work / "graph").exists():
        return ExportedGraph.open(work / "graph")
    base, unet = "shapes", CASES[name].unet
    if unet is not None:
        base = str(work / "pipeline")
        if not Path(base).exists():
            write_pipeline(Path(base), unet)
    recipe = Recipe.load("ptq", {"sampling": {"steps": 4}, "dataset": {"prompts": 1, "width": 1}})
    prompts = PromptSet((Prompt("p", "a red circle"),))
    calibrated = calibrate(resolve_base(base), recipe, prompts, work / "calib", replace=True)
    return export_graph(calibrated, work / "graph")


def measure(
    graph: ExportedGraph, target: tuple[str, Execution], batch: int, rounds: int, work: Path
) -> list[dict[str, Any]]:
    """One row per lowering: its CPU and wall seconds per step, and the ratio of each to ``static``'s in that round."""
    with ExitStack() as stack:
        runners = {
            name: stack.enter_context(load_engine(built(graph, target, batch, name, work), graph)) for name in LOWERINGS
        }
        inputs = step_inputs(graph, batch)
        rows = taken(runners, inputs, rounds)
    cpu, wall = rows[..., 0], rows[..., 1]
    return [
        {
            "lowering": name,
            "cpu_ms": round(float(np.median(cpu[:, index])) * 1000, 2),
            "wall_ms": round(float(np.median(wall[:, index])) * 1000, 2),
            "cpu_ratio": quartiles(cpu[:, index] / cpu[:, 0]),
            "wall_ratio": quartiles(wall[:, index] / wall[:, 0]),
        }
        for index, name in enumerate(LOWERINGS)
    ]


def built(graph: ExportedGraph, target: tuple[str, Execution], batch: int, lowering: str, work: Path) -> Engine:
    backend, execution = target
    options = BuildOptions(**asdict(execution), profile=ShapeProfile(batch, batch, batch), **LOWERINGS[lowering])
    out = work / "engine" / f"{backend}-{execution}-{batch}-{lowering}"
    return Engine.open(out) if out.exists() else build_engine(graph, out, backend=backend, options=options)


def step_inputs(graph: ExportedGraph, batch: int) -> dict[str, np.ndarray]:
    """Noise, on one calibrated row."""
    generator = np.random.default_rng(0)
    shapes = {spec.name: tuple(batch if isinstance(n, str) else n for n in spec.shape) for spec in graph.inputs}
    names = ("sample", "encoder_hidden_states")
    values = {name: generator.standard_normal(shapes[name]).astype(np.float32) for name in names}
    return values | {"timestep_index": np.full(batch, graph.timesteps.calibrated_indices[0])}


def taken(runners: dict[str, BoundRunner], inputs: dict[str, np.ndarray], rounds: int) -> np.ndarray:
    """CPU and wall seconds of a step [rounds, lowerings, 2]; the order turns, and steps to warm up do not count."""
    names = list(runners)
    single = [[seconds_of(runners[name], inputs, 1)[0] for name in names] for _ in range(2)][1]
    steps = max(1, round(CHUNK_S / min(single)))
    seconds = np.zeros((rounds, len(names), 2))
    for number in range(rounds):
        for index in np.roll(np.arange(len(names)), number):
            seconds[number, index] = seconds_of(runners[names[index]], inputs, steps)
    return seconds


def seconds_of(runner: BoundRunner, inputs: dict[str, np.ndarray], steps: int) -> tuple[float, float]:
    start = time.process_time(), time.perf_counter()
    for _ in range(steps):
        runner.infer(inputs)
    return (time.process_time() - start[0]) / steps, (time.perf_counter() - start[1]) / steps


def quartiles(values: np.ndarray) -> dict[str, float]:
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return {"median": round(float(middle), 3), "low": round(float(low), 3), "high": round(float(high), 3)}


if __name__ == "__main__":
    main()
