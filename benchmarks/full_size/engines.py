"""Engines at Stable Diffusion v1-4's size, random weights: time against NNCF, OpenVINO and ONNX Runtime; RTX builds.

Made in this order, each step by itself (what is there already is kept), all in one work folder of about 40 GB:

    python -m benchmarks.full_size.ptq fp|w8a8|w4a8     # three calibrated models
    python -m benchmarks.full_size.nncf_baseline graph            # and quantize, in NNCF's own environment
    python -m benchmarks.full_size.engines graphs       # fp32 of fp and w8a8, fp16 of all
    python -m benchmarks.full_size.engines engines      # OpenVINO and ONNX Runtime
    python -m benchmarks.full_size.engines time         # all in one run, in turns; wants a machine of its own
    python -m benchmarks.full_size.engines shift --rounds 40      # w8a8 over w8a8-unshifted, which ptq makes too
    python -m benchmarks.full_size.engines layers       # where OpenVINO spends a step, ours and NNCF's
    python -m benchmarks.full_size.engines rtx          # TensorRT-RTX ahead of time: fp16, w8a8, w4a8

``engines``, ``time``, ``shift`` and ``layers`` take ``--precision bf16`` or ``f32``, every step ``--work``. Each writes
its part of ``results/full_size_engines.json``; ``pages/write.py`` makes the page of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.full_size.contenders import Contender, step_ratio, timed_in_turns
from s2p_deploy.bench.measure import WORKER, load_request
from s2p_deploy.bench.result import this_machine
from s2p_deploy.engines import BuildOptions, Limits, ShapeProfile, build_engine
from s2p_deploy.export import export_graph
from s2p_deploy.records import CalibratedModel, Engine, ExportedGraph

BENCHMARKS = Path(__file__).resolve().parents[1]
IR_WORKER = (str(BENCHMARKS / "full_size" / "ir_worker.py"),)
BATCH = 2
TEXT_APART = "w8a8-text"  # of form w8a8, its text projections once per prompt
UNSHIFTED = "w8a8-unshifted"
GRAPHS = (
    *((form, "fp32") for form in ("fp", "w8a8", TEXT_APART, UNSHIFTED)),
    *((form, "fp16") for form in ("fp", "w8a8", "w4a8")),
)
ENGINES = (*((form, "openvino") for form in ("w8a8", TEXT_APART, UNSHIFTED, "fp")), ("fp", "onnxruntime"))
RTX_PROFILE = ShapeProfile(1, BATCH, 4)
RTX_FORMS = ("fp", "w8a8", "w4a8")
BUILD_TIMEOUT_S = 7200.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("graphs", "engines", "time", "shift", "layers", "rtx"))
    parser.add_argument("--work", type=Path, default=Path("build/full_size"))
    parser.add_argument("--precision", choices=("bf16", "f32"), default="bf16")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--nncf", default="nncf", help="folder of the NNCF model in the work folder")
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "results" / "full_size_engines.json")
    asked = parser.parse_args()
    match asked.step:
        case "graphs":
            write_graphs(asked.work)
        case "engines":
            build_engines(asked.work, asked.precision)
        case "time":
            found = time_engines(asked.work, asked.precision, asked.rounds, asked.nncf)
            note(asked.out, "time", asked.precision, found)
        case "shift":
            note(asked.out, "shift", asked.precision, time_shift(asked.work, asked.precision, asked.rounds))
        case "layers":
            note(asked.out, "layers", asked.precision, layer_times(asked.work, asked.precision, asked.nncf))
        case "rtx":
            for form in RTX_FORMS:
                note(asked.out, "rtx", form, build_rtx(asked.work, f"graph-{form}-fp16"))


def write_graphs(work: Path) -> None:
    """The graphs that are not there yet, of the models that are."""
    for form, dtype in GRAPHS:
        out, model = work / f"graph-{form}-{dtype}", work / f"model-{form.removesuffix('-text')}"
        if not out.exists() and model.exists():
            start = time.perf_counter()
            text = "input" if form == TEXT_APART else "graph"
            export_graph(CalibratedModel.open(model), out, dtype=dtype, text_projections=text)
            print(f"{out.name}: {time.perf_counter() - start:.0f} s, peak so far {_own_peak_gb():.1f} GB", flush=True)


def build_engines(work: Path, precision: str) -> None:
    """The CPU engines that are not there yet, of the graphs that are; tuned for the batch that is measured."""
    for form, backend in ENGINES:
        own = {"precision": precision} if backend == "openvino" else {"optimization": "full"}
        out, folder = engine_folder(work, form, backend, *own.values()), work / f"graph-{form}-fp32"
        if not out.exists() and folder.exists():
            graph = ExportedGraph.open(folder)
            options = BuildOptions(**own, profile=ShapeProfile(1, BATCH, BATCH))
            made = build_engine(graph, out, backend=backend, options=options, limits=Limits(BUILD_TIMEOUT_S))
            print(f"{out.name}: {made.manifest.content['build_seconds']} s", flush=True)


def engine_folder(work: Path, form: str, backend: str, precision: str) -> Path:
    return work / f"engine-{form}-{backend}-{precision}"


def time_engines(work: Path, precision: str, rounds: int, nncf: str) -> dict[str, Any]:
    """Seconds per step of the contenders in turns; ratios ours over theirs."""
    engines = {
        "onnxruntime": engine_folder(work, "fp", "onnxruntime", "full"),
        "fp": engine_folder(work, "fp", "openvino", precision),
        "text": engine_folder(work, TEXT_APART, "openvino", precision),
        "ours": engine_folder(work, "w8a8", "openvino", precision),
    }
    models = {"openvino": work / "graph-fp-fp32" / "denoiser.onnx", "nncf": work / nncf / "denoiser.xml"}
    found = timed_in_turns(
        [engine_contender(name, Engine.open(folder)) for name, folder in engines.items()]
        + [
            Contender(name, IR_WORKER, {"model": str(file.resolve()), "precision": precision})
            for name, file in models.items()
        ],
        BATCH,
        rounds,
    )
    ours = found.seconds["ours"]
    return {
        "machine": this_machine().model_dump(),
        "batch": BATCH,
        "precision": precision,
        "nncf": json.loads((work / nncf / "about.json").read_text(encoding="utf-8")),
        "contenders": found.figures,
        "ours_over": {name: step_ratio(ours, theirs) for name, theirs in found.seconds.items() if name != "ours"},
    }


def time_shift(work: Path, precision: str, rounds: int) -> dict[str, Any]:
    """Seconds per step with the shift and without, in turns, and the ratio of the first to the second."""
    forms = ("w8a8", UNSHIFTED)
    engines = [(form, Engine.open(engine_folder(work, form, "openvino", precision))) for form in forms]
    found = timed_in_turns([engine_contender(*one) for one in engines], BATCH, rounds)
    return {
        "machine": this_machine().model_dump(),
        "batch": BATCH,
        "rounds": rounds,
        "contenders": found.figures,
        "shift_over_without": step_ratio(*(found.seconds[form] for form in forms)),
    }


def engine_contender(name: str, engine: Engine) -> Contender:
    """One of our engines, which only steps and draws nothing."""
    return Contender(name, WORKER, load_request(engine) | {"generation": None})


def layer_times(work: Path, precision: str, nncf: str) -> dict[str, Any]:
    """Milliseconds per kind of layer in one step by OpenVINO's own counters, for ours and NNCF's."""
    folders = {"ours": engine_folder(work, "w8a8", "openvino", precision), "nncf": work / nncf}
    return {
        "machine": this_machine().model_dump(),
        "layers": {name: profiled(folder / "denoiser.xml", precision) for name, folder in folders.items()},
    }


def profiled(xml: Path, precision: str) -> dict[str, dict[str, float]]:
    """Kind of layer and its kernel -> milliseconds and number; the fastest of three steps."""
    import openvino

    model = openvino.Core().read_model(xml)
    inputs = {port.get_any_name(): _example(port) for port in model.inputs}
    model.reshape({name: list(value.shape) for name, value in inputs.items()})
    properties = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY", "PERF_COUNT": "YES"}
    request = openvino.Core().compile_model(model, "CPU", properties).create_infer_request()
    runs = []
    for _ in range(4):
        request.infer(inputs)
        runs.append(request.get_profiling_info())
    fastest = min(runs[1:], key=lambda run: sum(layer.real_time.total_seconds() for layer in run))
    spent: Counter[str] = Counter()
    number: Counter[str] = Counter()
    for layer in fastest:
        kind = f"{layer.node_type} {layer.exec_type}"
        spent[kind] += layer.real_time.total_seconds() * 1e3
        number[kind] += layer.real_time.total_seconds() > 0
    return {kind: {"ms": round(ms, 2), "layers": number[kind]} for kind, ms in spent.most_common() if ms >= 0.1}


def _example(port: Any) -> np.ndarray:  # noqa: ANN401 - openvino is not typed
    shape = [size.get_length() if size.is_static else BATCH for size in port.get_partial_shape()]
    fill = 1 if port.get_any_name() in {"act_scales", "timestep_index", "timestep"} else 0
    return np.full(shape, fill, port.get_element_type().to_dtype())


def build_rtx(work: Path, graph_name: str, profile: ShapeProfile = RTX_PROFILE) -> dict[str, Any]:
    """Builds one plan and deletes it; what it took, its size, and what its layers are stored in."""
    out = work / f"{graph_name}-rtx"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    options = BuildOptions(profile=profile)
    graph = ExportedGraph.open(work / graph_name)
    made = build_engine(
        graph, out, backend="tensorrt_rtx", options=options, replace=True, limits=Limits(BUILD_TIMEOUT_S)
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    content = made.manifest.content
    found = {
        "machine": this_machine().model_dump(),
        "profile": dataclasses.asdict(options.profile),
        "build_s": content["build_seconds"],
        "processor_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "peak_memory_gb": round(content["peak_rss_bytes"] / 1e9, 2),
        "plan_mb": round(sum(content["sizes"].values()) / 1e6, 1),
        "layers": _layer_kinds(made),
    }
    print(json.dumps({graph_name: {key: value for key, value in found.items() if key != "machine"}}), flush=True)
    shutil.rmtree(out)
    return found


def _layer_kinds(engine: Engine) -> list[dict[str, Any]]:
    """How many layers there are of each op, lowering, stored bits, activation bits and reported compute type."""
    kinds = Counter(
        (layer.op, layer.lowering, layer.weight_storage_bits, layer.activation_bits, layer.compute)
        for layer in engine.layers
    )
    names = ("op", "lowering", "weight_storage_bits", "activation_bits", "compute")
    return [dict(zip(names, kind, strict=True)) | {"layers": count} for kind, count in kinds.most_common()]


def note(out: Path, part: str, name: str, found: dict[str, Any]) -> None:
    """Puts one part into the JSON file, which keeps the others."""
    known = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"kind": "FullSizeEngines"}
    known.setdefault(part, {})[name] = found
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def _own_peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main()
