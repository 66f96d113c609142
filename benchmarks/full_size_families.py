"""Engines of the four families at full size, random weights: the OpenVINO step against bf16, and TensorRT-RTX builds.

    python benchmarks/full_size_export.py sdxl fp          # and w4a8: the graphs
    python benchmarks/full_size_families.py step sdxl [--pixels 512] [--rounds 4] [--forms w4a8 w4a8-text]
    python benchmarks/full_size_families.py rtx sdxl

``step`` builds OpenVINO engines (hint bf16) of the fp16 graphs of ``fp`` and of other forms, loads each in its own
process and times them in turns; ``w4a8-text`` has its text projections apart. With ``--pixels`` they are built for that
size, from the graphs that ``full_size_export.py --sizes dynamic`` wrote. ``rtx`` builds ahead of time, one after the
other, and keeps no plan. Figures go into ``results/full_size_families.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from full_size_engines import BATCH, BUILD_TIMEOUT_S, build_rtx, note, step_ratio
from full_size_export import graph_name
from full_size_pipeline import ORIGINALS

from s2p_deploy.bench.machine import this_machine
from s2p_deploy.bench.measure import WORKER, load_request
from s2p_deploy.bench.turns import children, in_turns
from s2p_deploy.engines import BuildOptions, Limits, ShapeProfile, Span, build_engine
from s2p_deploy.engines.profile_shapes import shape_at
from s2p_deploy.records import Engine, ExportedGraph

HINT = "bf16"
PIXELS_PER_LATENT = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measure", choices=("step", "rtx"))
    parser.add_argument("original", choices=ORIGINALS)
    parser.add_argument("--forms", nargs="+", choices=("w8a8", "w4a8", "w4a8-text"), default=["w4a8"])
    parser.add_argument("--pixels", type=int)
    parser.add_argument("--alone", action="store_true", help="without fp, where memory is too small for it")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--work", type=Path, default=Path("build/full_size"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "full_size_families.json")
    asked = parser.parse_args()
    work = asked.work / asked.original
    if asked.measure == "step":
        found = time_steps(work, (*asked.forms, *(() if asked.alone else ("fp",))), asked.pixels, asked.rounds)
        note(asked.out, "step", f"{asked.original} {asked.pixels or 'trained'}", found)
        print(json.dumps(found, indent=1))
        return
    for form in ("fp", *asked.forms):
        note(asked.out, "rtx", f"{asked.original} {form}", build_rtx(work, form))


def time_steps(work: Path, forms: tuple[str, ...], pixels: int | None, rounds: int) -> dict[str, Any]:
    """Seconds per step of all forms in turns, two steps a turn after one unmeasured; ratios to the last form's."""
    engines = {name: cpu_engine(work, name, pixels) for name in forms}
    seconds: dict[str, list[list[float]]] = {name: [] for name in engines}
    memory: dict[str, float] = {}
    with children([(name, WORKER) for name in engines]) as asked:
        loads = {
            child.name: child.ask("load", batch=BATCH, drawing=None, **load_request(engines[child.name]))["seconds"]
            for child in reversed(asked)  # the largest first: its peak passes while the others hold nothing
        }

        def visit(member: int, number: int) -> None:
            answer = asked[member].ask("steps", count=2)
            name = asked[member].name
            memory[name] = answer["peak"] / 1e9
            seconds[name].append(answer["seconds"])
            print(f"round {number + 1}/{rounds} {name}: {answer['seconds']}", flush=True)

        in_turns(len(asked), rounds, visit)
    times = {name: np.asarray(found) for name, found in seconds.items()}
    return {
        "machine": this_machine().model_dump(),
        "batch": BATCH,
        "latents": _latents(engines[forms[-1]]),
        "hint": HINT,
        "engines": {
            name: {
                "best_s": round(float(found.min()), 3),
                "median_s": round(float(np.median(found)), 3),
                "steps": int(found.size),
                "load_s": round(loads[name], 1),
                "peak_memory_gb": round(memory[name], 2),
            }
            for name, found in times.items()
        },
        "ratios": {name: step_ratio(times[name], times[forms[-1]]) for name in forms[:-1]},
    }


def _latents(engine: Engine) -> int:
    """Height of the latents that an engine is tuned for."""
    sizes = ShapeProfile.from_json(engine.manifest.content["profile"]).sizes("optimum")
    sample = next(spec for spec in engine.inputs if spec.name == "sample")
    return shape_at(sample, sizes)[2]


def cpu_engine(work: Path, form: str, pixels: int | None) -> Engine:
    """The OpenVINO engine of one form, built where it is not there yet."""
    out = work / f"engine-{form}-openvino-{HINT}-{pixels or 'trained'}"
    if out.exists():
        return Engine.open(out)
    recipe, _, apart = form.partition("-")
    graph = ExportedGraph.open(work / graph_name(recipe, "fp16", sizes="dynamic" if pixels else "fixed", text=apart))
    latents = pixels // PIXELS_PER_LATENT if pixels else 0
    side = Span(latents, latents, latents) if pixels else None
    options = BuildOptions(HINT, ShapeProfile(1, BATCH, BATCH, side, side))
    return build_engine(graph, "openvino", out, options=options, limits=Limits(BUILD_TIMEOUT_S))


if __name__ == "__main__":
    main()
