"""Engines of the four families at full size, random weights: the OpenVINO step against bf16, and TensorRT-RTX builds.

    python -m benchmarks.full_size.export sdxl fp          # and w4a8: the graphs
    python -m benchmarks.full_size.families step sdxl [--pixels 512] [--rounds 4] [--forms w4a8 w4a8-text fp]
    python -m benchmarks.full_size.families rtx|rtx-wide sdxl

``step`` builds OpenVINO engines (bf16) of fp16 graphs, loads each in its own process and times them in turns with
the graph of ``fp`` as OpenVINO reads it by itself. ``w4a8-text`` has its text projections apart; ``fp`` is our own
engine of that graph. With ``--pixels`` all are for that size, from the graphs that ``full_size/export.py --sizes
dynamic`` wrote.

``rtx`` builds ahead of time, one after the other, and keeps no plan; ``rtx-wide`` does so with one profile of batch 1
to 16 and 512 to 1024 pixels. Figures go into ``results/full_size_families.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.full_size.contenders import Contender, step_ratio, timed_in_turns
from benchmarks.full_size.engines import (
    BATCH,
    BUILD_TIMEOUT_S,
    IR_WORKER,
    RTX_PROFILE,
    build_rtx,
    engine_contender,
    note,
)
from benchmarks.full_size.export import graph_name
from benchmarks.full_size.pipeline import MODELS
from s2p_deploy.bench.result import this_machine
from s2p_deploy.engines import BuildOptions, Limits, ShapeProfile, Span, build_engine
from s2p_deploy.engines.options import shape_at
from s2p_deploy.records import Engine, ExportedGraph

PRECISION = "bf16"
RIVAL = "openvino"
PIXELS_PER_LATENT = 8
WIDE_PROFILE = ShapeProfile(1, BATCH, 16, Span(64, 64, 128, 8), Span(64, 64, 128, 8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measure", choices=("step", "rtx", "rtx-wide"))
    parser.add_argument("original", choices=MODELS)
    parser.add_argument("--forms", nargs="+", choices=("fp", "w8a8", "w4a8", "w4a8-text"), default=["w4a8"])
    parser.add_argument("--pixels", type=int)
    parser.add_argument("--alone", action="store_true", help="without floating point, where memory is too small")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--work", type=Path, default=Path("build/full_size"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "full_size_families.json")
    asked = parser.parse_args()
    work = asked.work / asked.original
    if asked.measure == "step":
        found = time_steps(work, tuple(asked.forms), asked.pixels, asked.rounds, alone=asked.alone)
        note(asked.out, "step", f"{asked.original} {asked.pixels or 'trained'}", found)
        print(json.dumps(found, indent=1))
        return
    sizes, profile = ("dynamic", WIDE_PROFILE) if asked.measure == "rtx-wide" else ("fixed", RTX_PROFILE)
    for form in dict.fromkeys(("fp", *asked.forms)):
        made = build_rtx(work, graph_name(form, "fp16", sizes=sizes), profile)
        note(asked.out, asked.measure, f"{asked.original} {form}", made)


def time_steps(work: Path, forms: tuple[str, ...], pixels: int | None, rounds: int, *, alone: bool) -> dict[str, Any]:
    """Seconds per step of all forms in turns; ratios to OpenVINO by itself."""
    engines = {form: cpu_engine(work, form, pixels) for form in forms}
    latents = _latents(next(iter(engines.values())))
    contenders = [engine_contender(form, engine) for form, engine in engines.items()]
    if not alone:
        graph = work / graph_name("fp", "fp16", sizes="dynamic" if pixels else "fixed") / "denoiser.onnx"
        contenders.append(
            Contender(RIVAL, IR_WORKER, {"model": str(graph.resolve()), "precision": PRECISION, "latents": latents})
        )
    # The largest first: its peak passes while the others hold nothing.
    found = timed_in_turns(contenders[::-1], BATCH, rounds)
    ratios = {} if alone else {form: step_ratio(found.seconds[form], found.seconds[RIVAL]) for form in forms}
    return {
        "machine": this_machine().model_dump(),
        "batch": BATCH,
        "latents": latents,
        "precision": PRECISION,
        "engines": found.figures,
        "ratios": ratios,
    }


def _latents(engine: Engine) -> int:
    """Height of the latents that an engine is tuned for."""
    sizes = engine.profile.sizes("optimum")
    sample = next(spec for spec in engine.inputs if spec.name == "sample")
    return shape_at(sample, sizes)[2]


def cpu_engine(work: Path, form: str, pixels: int | None) -> Engine:
    """The OpenVINO engine of one form, built where it is not there yet."""
    out = work / f"engine-{form}-openvino-{PRECISION}-{pixels or 'trained'}"
    if out.exists():
        return Engine.open(out)
    recipe, _, apart = form.partition("-")
    graph = ExportedGraph.open(work / graph_name(recipe, "fp16", sizes="dynamic" if pixels else "fixed", text=apart))
    latents = pixels // PIXELS_PER_LATENT if pixels else 0
    side = Span(latents, latents, latents) if pixels else None
    options = BuildOptions(PRECISION, profile=ShapeProfile(1, BATCH, BATCH, side, side))
    return build_engine(graph, out, backend="openvino", options=options, limits=Limits(BUILD_TIMEOUT_S))


if __name__ == "__main__":
    main()
