"""What is mutated: small signed artifacts of every kind that is loaded, and what each computes."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from s2p_deploy.engines import BuildOptions, build_engine, load_engine
from s2p_deploy.engines.build import compile_in_child
from s2p_deploy.engines.machine import installed_version
from s2p_deploy.records import (
    Base,
    CalibratedModel,
    Engine,
    ExportedGraph,
    ScaleTable,
    ShapeProfile,
    TimestepTable,
    TransformSpec,
    write_artifact,
)
from s2p_deploy.records.precision_plan import write_plan
from s2p_deploy.records.scale_table import write_scale_table, write_timestep_table
from s2p_deploy.records.typed_json import json_data
from tests.engines.small_graph import CALIBRATED, POINTS, ROWS, small_graph, small_inputs, small_scales

OPTIONS = {"onnxruntime": BuildOptions(optimization="reference"), "openvino": BuildOptions(precision="f32")}
GRAPH, MODEL, PLAN = "graph", "calibrated", "tensorrt_rtx"
OUTSIDE = ("canary.bin", "denoiser.onnx.data")  # beside a case's artifact; nobody may open them


def make_targets(folder: Path, names: tuple[str, ...]) -> None:
    """Writes every artifact to ``folder / name``."""
    graph = small_graph(folder / GRAPH)
    for name in names:
        if name in OPTIONS:
            build_engine(graph, folder / name, backend=name, options=OPTIONS[name])
        elif name == MODEL:
            _write_calibrated(folder / MODEL, graph)
        elif name == PLAN:
            _write_plan_engine(folder / PLAN, graph)


def use(name: str, folder: Path) -> dict[str, np.ndarray]:
    """Opens, loads and runs an artifact in this process; what it computes."""
    if name == GRAPH:
        return _built_and_run(ExportedGraph.open(folder))
    if name == MODEL:
        return _tensors(CalibratedModel.open(folder))
    with load_engine(Engine.open(folder), tried=True) as runner:
        return runner.infer(small_inputs())


def use_isolated(name: str, folder: Path) -> None:
    """The way of the command line, where whatever may crash runs in a child process."""
    if name == GRAPH:
        with tempfile.TemporaryDirectory() as out:
            build_engine(ExportedGraph.open(folder), Path(out) / "engine", backend="onnxruntime")
    else:
        load_engine(Engine.open(folder)).close()


def _built_and_run(graph: ExportedGraph) -> dict[str, np.ndarray]:
    """What the child process of a build does, then one run."""
    import onnxruntime

    options = asdict(replace(OPTIONS["onnxruntime"], profile=ShapeProfile(1, 2, 4)))
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "engine"
        out.mkdir()
        message = {"graph": str(graph.folder), "backend": "onnxruntime", "options": options, "device": "cpu"}
        compile_in_child(message | {"folder": str(out), "scratch": scratch})
        session = onnxruntime.InferenceSession(out / "denoiser.onnx", providers=["CPUExecutionProvider"])
        inputs = small_inputs() | {"act_scales": graph.scales.scales}
        return {"noise_pred": session.run(None, inputs)[0]}


def _tensors(model: CalibratedModel) -> dict[str, np.ndarray]:
    table = model.time_table()
    slices = np.asarray(list(table.slices.values()))
    return model.weights() | model.weight_scales() | {"time": table.projections, "slices": slices}


def _write_calibrated(folder: Path, graph: ExportedGraph) -> None:
    """A calibrated model of no particular denoiser."""
    random = np.random.default_rng(3)

    def fill(out: Path) -> dict[str, Any]:
        save_file({"network.conv.weight": random.random((4, 4), np.float32)}, out / "weights.safetensors")
        save_file({"conv": random.random((4, 1), np.float32)}, out / "weight_scales.safetensors")
        save_file({"time_projections": random.random((ROWS, 8), np.float32)}, out / "time_table.safetensors")
        write_scale_table(ScaleTable(small_scales(), POINTS, CALIBRATED), out / "act_scales.safetensors")
        write_plan(graph.plan, out / "plan.yaml")
        angle = np.linspace(0.03, 1.5, ROWS)
        write_timestep_table(TimestepTable("DDIMScheduler", {}, 3, CALIBRATED, angle), out / "timesteps.json")
        return {"time_slices": {"conv": [0, 8]}, "tokens": 6, "transforms": json_data(TransformSpec())}

    write_artifact(folder, kind="CalibratedModel", base=Base("none", "0" * 64), recipe={}, fill=fill)


def _write_plan_engine(folder: Path, graph: ExportedGraph) -> None:
    """An engine of TensorRT-RTX around bytes that are no plan: without a GPU it is refused before they are read."""
    kept = ("act_scales.safetensors", "timesteps.json")
    shape = {"minimum": 1, "optimum": 2, "maximum": 4}

    def fill(out: Path) -> dict[str, Any]:
        for name in kept:
            shutil.copyfile(graph.folder / name, out / name)
        (out / "denoiser.plan").write_bytes(np.random.default_rng(4).bytes(5000))
        return {
            "backend": PLAN,
            "precision": "f16",
            "provider": None,
            "optimization": None,
            "dtype": "fp16",
            "profile": shape,
            "inputs": [dataclasses.asdict(spec) for spec in graph.inputs],
            "outputs": [dataclasses.asdict(spec) for spec in graph.outputs],
            "layers": [],
            "engine_files": ["denoiser.plan"],
            "sizes": {"denoiser.plan": 5000},
            "environment": {PLAN: installed_version(PLAN) or "none", "device": "CUDA GPU"},
            "quantizers": graph.manifest.content["quantizers"],
            "denoiser_config": {},
        }

    parents = {"graph": (graph.folder, graph.manifest)}
    write_artifact(folder, kind="Engine", base=graph.manifest.base, recipe={}, fill=fill, parents=parents)


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    """Whether two results agree to float32 rounding."""
    return left.keys() == right.keys() and all(
        left[name].shape == right[name].shape and np.allclose(left[name], right[name], rtol=1e-5, atol=1e-6)
        for name in left
    )


def manifest_data(folder: Path) -> dict[str, Any]:
    """The JSON of a manifest."""
    data: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return data
