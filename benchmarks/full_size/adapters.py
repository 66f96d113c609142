"""LoRAs on engines at full size, random weights: what branches for them cost, and how soon a file acts.

    python -m benchmarks.full_size.adapters engines {sd14,sdxl} [--work build/full_size] [--form attention]
    python -m benchmarks.full_size.adapters time {sd14,sdxl} [--rounds 20]     # a step with branches and without
    python -m benchmarks.full_size.adapters file {sd14,sdxl}                   # from a LoRA's file to its first step
    python -m benchmarks.full_size.adapters rtx {shapes,sd14,sdxl}             # TensorRT-RTX builds, without a GPU
    python -m benchmarks.full_size.adapters layers {sd14,sdxl}                 # where OpenVINO spends a step

Engines are W8A8 of recipe ``ptq-stream`` with scales from the largest magnitudes, for OpenVINO bf16 and batch 2:
without branches, and of rank 32 at two sets of layers. They are made once, in ``WORK/ORIGINAL``. Steps are timed in one
process in turns; a busy machine slows all alike, and processor seconds stand beside those of the clock. Figures go into
``results/full_size_adapters.json``; ``pages/write.py`` makes the table of it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.full_size.engines import build_rtx, profiled
from benchmarks.full_size.pipeline import MODELS, gigabytes, write_original
from s2p_deploy.bench.measure import WORKER, load_request
from s2p_deploy.bench.result import this_machine
from s2p_deploy.bench.turns import children, in_turns
from s2p_deploy.calib import calibrate
from s2p_deploy.context import Context
from s2p_deploy.engines import BuildOptions, Limits, ShapeProfile, build_engine, load_engine
from s2p_deploy.export import export_graph
from s2p_deploy.export.lora_targets import LoraRequest
from s2p_deploy.families import resolve_base
from s2p_deploy.metrics import median_of
from s2p_deploy.pipeline import open_pipeline
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import CalibratedModel, Engine, ExportedGraph, file_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

RANK, BATCH = 32, 2
BUNDLED = "shapes"
WITHOUT = "without"
FORMS = {
    WITHOUT: None,
    "attention": LoraRequest(RANK),
    "linears": LoraRequest(RANK, ("attention", "feed-forward", "projections")),
}
ASKED_S = 1.0  # from a LoRA's file to the first step
BUILD_TIMEOUT_S = 7200.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("engines", "time", "file", "rtx", "layers"))
    parser.add_argument("original", choices=(*MODELS, BUNDLED))
    parser.add_argument("--form", action="append", choices=FORMS, help="of these alone; may be repeated")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--work", type=Path, default=Path("build/full_size"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "full_size_adapters.json")
    asked = parser.parse_args()
    work, forms = asked.work / asked.original, asked.form or list(FORMS)
    match asked.step:
        case "engines":
            found: dict[str, Any] = {form: make_engine(work, asked.original, form) for form in forms}
        case "time":
            found = time_steps(work, forms, asked.rounds)
        case "file":
            found = time_file(work)
        case "rtx":
            found = {form: _plan(work, asked.original, form) for form in forms}
        case "layers":
            found = {form: profiled(_folder(work, "engine", form) / "denoiser.xml", "bf16") for form in forms}
    known = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.exists() else {}
    steps = known.setdefault(asked.original, {})
    replaced = asked.step in {"time", "file"}
    steps[asked.step] = found if replaced else steps.get(asked.step, {}) | found
    asked.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


def make_engine(work: Path, original: str, form: str) -> dict[str, Any]:
    """Builds an engine that is not there yet; its size, and what building took at most."""
    out = _folder(work, "engine", form)
    if not out.exists():
        options = BuildOptions(precision="bf16", profile=ShapeProfile(1, BATCH, BATCH))
        graph = _graph(work, original, form, "fp32")
        build_engine(graph, out, backend="openvino", options=options, limits=Limits(BUILD_TIMEOUT_S))
    engine = Engine.open(out)
    content = engine.manifest.content
    return {
        "branches": 0 if engine.lora is None else len(engine.lora.layers),
        "engine_gb": gigabytes(out),
        "graph_gb": gigabytes(_folder(work, "graph", form, "fp32")),
        "build_s": content["build_seconds"],
        "build_peak_memory_gb": round(content["peak_rss_bytes"] / 1e9, 2),
    }


def time_steps(work: Path, forms: list[str], rounds: int) -> dict[str, Any]:
    """Seconds of a step by the clock and by processors, in turns in one process, and memory in a process each."""
    engines = {form: Engine.open(_folder(work, "engine", form)) for form in forms}
    memory = {form: _peak_gb(engine) for form, engine in engines.items()}
    runners = {form: load_engine(engine) for form, engine in engines.items()}
    inputs = _inputs(next(iter(runners.values())).inputs)
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    processor: dict[str, list[float]] = {form: [] for form in forms}
    for runner in runners.values():
        runner.infer(inputs)  # compiles

    def visit(member: int, number: int) -> None:
        form = forms[member]
        clock, used = _clocked(lambda: runners[form].infer(inputs))
        seconds[form].append(clock)
        processor[form].append(used)
        print(f"round {number + 1}/{rounds} {form}: {clock:.2f} s, of processors {used:.2f}", flush=True)

    in_turns(len(forms), rounds, visit)
    return {"machine": this_machine().model_dump(), "batch": BATCH, "rank": RANK, "rounds": rounds} | (
        compared(seconds, processor) | {"peak_memory_gb": memory}
    )


def compared(seconds: dict[str, list[float]], processor: dict[str, list[float]]) -> dict[str, Any]:
    """Medians of seconds per step [rounds] by form, by clock and processors; ratios to the one without."""
    others = [form for form in seconds if form != WITHOUT]
    return {
        "median_s": {form: float(np.median(found)) for form, found in seconds.items()},
        "median_processor_s": {form: float(np.median(found)) for form, found in processor.items()},
        "ratio": {form: _paired(seconds[form], seconds[WITHOUT]) for form in others},
        "processor_ratio": {form: _paired(processor[form], processor[WITHOUT]) for form in others},
    }


def _paired(ours: list[float], theirs: list[float]) -> dict[str, float | None]:
    """The median of the rounds' ratios, with its interval: what slowed a round slowed both."""
    found = median_of(np.asarray(ours) / np.asarray(theirs))
    return {"median": found.value, "low": found.low, "high": found.high}


def time_file(work: Path, repeats: int = 7) -> dict[str, Any]:
    """Seconds from a LoRA's file, kohya's layout and half precision, to the first step, beyond those of a usual step.

    The process is warm: other LoRAs, with other numbers, were loaded before. What the first step takes longer is what
    putting the matrices into the engine's inputs takes, which the pipeline does in that call.
    """
    folder, base = _folder(work, "engine", "attention"), resolve_base(str(work / "pipeline"))
    before = _digests(folder)
    engine = Engine.open(folder)
    pipe = open_pipeline(engine, base).pipe
    denoiser, slots = next(part for part in pipe.components.values() if hasattr(part, "loras")), engine.lora
    assert slots is not None, "it was built with branches"
    files = [write_lora(work / f"lora-{seed}.safetensors", slots.layers, seed) for seed in range(repeats)]
    loads, puts = [], []
    for number, file in enumerate(files):
        loads.append(_clocked(lambda file=file, number=number: pipe.load_lora_weights(file, adapter_name=f"l{number}")))
        puts.append(_clocked(lambda: denoiser.loras.strengths({}, BATCH)))
        pipe.unload_lora_weights()
    both = np.asarray(loads) + np.asarray(puts)
    denoiser.close()
    return {
        "machine": this_machine().model_dump(),
        "layers": len(slots.layers),
        "rank": RANK,
        "file_mb": round(files[0].stat().st_size / 1e6, 1),
        "first_s": float(both[0, 0]),
        "median_s": float(np.median(both[1:, 0])),
        "median_processor_s": float(np.median(both[1:, 1])),
        "of_that_putting_in_s": float(np.median(np.asarray(puts)[1:, 0])),
        "asked_s": ASKED_S,
        "engine_files_unchanged": _digests(folder) == before,
    }


def _graph(work: Path, original: str, form: str, dtype: str) -> ExportedGraph:
    """A form's graph; made, with the pipeline and the calibrated model, where it is not there."""
    pipeline, model, out = work / "pipeline", work / "model-adapters", _folder(work, "graph", form, dtype)
    if original != BUNDLED and not pipeline.exists():
        write_original(pipeline, MODELS[original])
    if not model.exists():
        recipe = Recipe.load("ptq-stream", {"scales": {"weights": "max"}})
        base = resolve_base(BUNDLED if original == BUNDLED else str(pipeline))
        calibrate(base, recipe, None, model, context=Context(device="cpu"))
    if not out.exists():
        export_graph(CalibratedModel.open(model), out, dtype="fp16" if dtype == "fp16" else "fp32", lora=FORMS[form])
    return ExportedGraph.open(out)


def _plan(work: Path, original: str, form: str) -> dict[str, Any]:
    """What building a form's TensorRT-RTX plan took; its layers are those of the plan without branches."""
    found = build_rtx(work, _graph(work, original, form, "fp16").folder.name)
    return {name: value for name, value in found.items() if name != "layers"}


def _folder(work: Path, kind: str, form: str, *more: str) -> Path:
    return work / "-".join((kind, "lora", form, *more))


def _peak_gb(engine: Engine) -> float:
    """Memory of a process that loads an engine and runs it, at most."""
    with children([("engine", WORKER)]) as loaded:
        loaded[0].request("load", batch=BATCH, **load_request(engine), generation=None)
        return round(loaded[0].request("steps", count=1)["peak"] / 1e9, 2)


def _inputs(specs: Iterable[Any]) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    shapes = {spec.name: [BATCH if isinstance(size, str) else size for size in spec.shape] for spec in specs}
    values = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return values | {"timestep_index": np.zeros(BATCH, np.int64)}


def write_lora(file: Path, layers: Iterable[Any], seed: int) -> Path:
    """A random LoRA of linear layers in kohya's layout, with alphas."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for slot in layers:
        name = f"lora_unet_{slot.layer.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = torch.randn(RANK, *slot.inputs, generator=generator).half()
        tensors[f"{name}.lora_up.weight"] = (torch.randn(slot.outputs, RANK, generator=generator) * 0.01).half()
        tensors[f"{name}.alpha"] = torch.tensor(RANK / 2).half()
    save_file(tensors, file)
    return file


def _digests(folder: Path) -> dict[str, str]:
    return {file.name: file_digest(file) for file in sorted(folder.iterdir())}


def _clocked(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds of a call by the clock and by this process's processors."""
    start, used = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - used


if __name__ == "__main__":
    main()
