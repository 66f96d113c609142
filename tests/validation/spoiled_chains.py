"""Chains with one artifact changed, every digest and seal made anew: integrity has nothing to say, gates must."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from s2p_deploy.calib import fake_quant_denoiser
from s2p_deploy.engines import engine_subgraphs, load_engine
from s2p_deploy.engines.load import remember_trial
from s2p_deploy.families import load_pipeline
from s2p_deploy.records import CalibratedModel, Engine, ExportedGraph, GateResult, Skipped
from s2p_deploy.validation import Chain, open_chain
from s2p_deploy.validation.end_to_end import measure_end_to_end, whole_denoiser
from s2p_deploy.validation.gates import judge
from s2p_deploy.validation.measurements import Measurements
from s2p_deploy.validation.parity import measure_parity
from s2p_deploy.validation.reference import ValidationLatents
from tests.mutations.sealing import seal_anew
from tests.mutations.targets import manifest_data

Edit = Callable[[Path], None]

SCALES, MODEL = "act_scales.safetensors", "denoiser.onnx"


def judged(chain: Chain, latents: ValidationLatents) -> dict[str, GateResult]:
    """What the numeric gates say, by name; pictures are not drawn."""
    fake_quant = fake_quant_denoiser(chain.calibrated)
    with (
        load_engine(remember_trial(chain.engine), chain.graph) as runner,
        engine_subgraphs(chain.engine, chain.graph) as parts,
    ):
        inside = measure_parity(chain, fake_quant, latents, runner, parts)
        whole = whole_denoiser(load_pipeline(chain.base), chain.calibrated.timesteps)
        found = measure_end_to_end(whole, fake_quant, runner, latents)
    results = judge(
        Measurements(**inside, end_to_end=found, pictures=Skipped("not drawn")), chain.recipe.validation.gates
    )
    return {result.name: result for result in results if not result.name.startswith(("pictures", "attribute"))}


def failures(results: dict[str, GateResult]) -> dict[str, str]:
    """Names of the gates that failed, and where."""
    return {name: result.where for name, result in results.items() if result.status == "failed"}


def with_engine(chain: Chain, folder: Path, edit: Edit) -> Chain:
    """The chain with a changed copy of its engine."""
    shutil.copytree(chain.engine.folder, folder)
    edit(folder)
    seal_anew(folder)
    return open_chain(Engine.open(folder), graph=chain.graph.folder, calib=chain.calibrated.folder)


def with_graph(chain: Chain, folder: Path, edit: Edit) -> Chain:
    """The chain with a changed copy of its graph, which its engine says that it was built from."""
    shutil.copytree(chain.graph.folder, folder / "graph")
    edit(folder / "graph")
    seal_anew(folder / "graph")
    graph = ExportedGraph.open(folder / "graph")
    shutil.copytree(chain.engine.folder, folder / "engine")
    data = manifest_data(folder / "engine")
    data["parents"]["graph"]["digest"] = graph.manifest.digest
    seal_anew(folder / "engine", data)
    return open_chain(Engine.open(folder / "engine"), graph=graph.folder, calib=chain.calibrated.folder)


def scales(change: Callable[[np.ndarray, tuple[str, ...]], np.ndarray]) -> Edit:
    """Changes the scale table, and the range that the manifest says was checked."""

    def edit(folder: Path) -> None:
        with safe_open(folder / SCALES, "numpy") as opened:
            names = tuple(opened.metadata()["quantizers"].split("\n"))
        tensors = load_file(folder / SCALES)
        changed = np.ascontiguousarray(change(tensors["act_scales"], names))
        save_file(tensors | {"act_scales": changed}, folder / SCALES, metadata={"quantizers": "\n".join(names)})
        data = manifest_data(folder)
        for name, column in zip(names, changed.T, strict=True):
            data["content"]["quantizers"][name] |= {"lowest": float(column.min()), "highest": float(column.max())}
        seal_anew(folder, data)

    return edit


def doubled(quantizer: str) -> Edit:
    return scales(lambda table, names: table * np.where(np.asarray(names) == quantizer, np.float32(2), np.float32(1)))


def shifted() -> Edit:
    return scales(lambda table, _names: np.roll(table, 1, axis=0))


def initializer(name: str, change: Callable[[np.ndarray], np.ndarray], file: str = MODEL) -> Edit:
    """Changes a constant of an ONNX file."""

    def edit(folder: Path) -> None:
        model = onnx.load(folder / file)
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        values = np.ascontiguousarray(change(numpy_helper.to_array(tensor)))
        tensor.CopyFrom(numpy_helper.from_array(values, name))
        _save(model, folder / file)

    return edit


def ir_bytes(before: np.ndarray, after: np.ndarray) -> Edit:
    """Changes a constant of an IR, found by its bytes."""

    def edit(folder: Path) -> None:
        path, old = folder / "denoiser.bin", np.ascontiguousarray(before).tobytes()
        data = path.read_bytes()
        assert data.count(old) == 1
        path.write_bytes(data.replace(old, np.ascontiguousarray(after).tobytes()))

    return edit


def permuted(weight: np.ndarray, axis: int) -> np.ndarray:
    """One output channel (along ``axis``) reads its inputs in the opposite order."""
    moved = np.moveaxis(weight.copy(), axis, 0)
    moved[0] = moved[0][::-1]
    return np.moveaxis(moved, 0, axis)


def text_of_the_first_sample(folder: Path) -> None:
    """Every sample of a batch is given the text of the first."""
    model = onnx.load(folder / MODEL)
    text, shared = "encoder_hidden_states", "shared_text"
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = shared if name == text else name
    constants = {"from": [0], "to": [1], "axis": [0]}
    for name, values in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(values, np.int64), f"{shared}/{name}"))
    first = [text, *(f"{shared}/{name}" for name in constants)]
    for node in (
        helper.make_node("Expand", [f"{shared}/first", f"{shared}/shape"], [shared], name=shared),
        helper.make_node("Shape", [text], [f"{shared}/shape"], name=f"{shared}/shape"),
        helper.make_node("Slice", first, [f"{shared}/first"], name=f"{shared}/first"),
    ):
        model.graph.node.insert(0, node)
    _save(model, folder / MODEL)


def later_timesteps(folder: Path) -> None:
    """The conditioning graph computes the features of another schedule: every timestep 40 later."""
    file = folder / "conditioning.onnx"
    model = onnx.load(file)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = "later" if name == "timesteps" else name
    model.graph.initializer.append(numpy_helper.from_array(np.asarray([40], np.float32), "later/by"))
    model.graph.node.insert(0, helper.make_node("Add", ["timesteps", "later/by"], ["later"], name="later"))
    onnx.save(model, file)


def _save(model: onnx.ModelProto, path: Path) -> None:
    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)
    onnx.save(model, path, save_as_external_data=True, location=data.name, size_threshold=1024)


def with_large_activations(chain: Chain, folder: Path, resnet: str) -> CalibratedModel:
    """The chain's model with a resnet whose first half is 10^5 times as large: the norm that follows takes it back.

    Nothing changes in float32; in float16 the values in between leave the range.
    """
    large, conv = np.float32(1e5), f"network.{resnet}.conv1"
    shutil.copytree(chain.calibrated.folder, folder)
    weights = load_file(folder / "weights.safetensors")
    weights |= {name: weights[name] * large for name in (f"{conv}.weight", f"{conv}.bias")}
    save_file(weights, folder / "weights.safetensors")
    weight_scales = load_file(folder / "weight_scales.safetensors")
    name = f"{resnet}.conv1"
    save_file(weight_scales | {name: weight_scales[name] * large}, folder / "weight_scales.safetensors")
    start, stop = manifest_data(folder)["content"]["time_slices"][resnet]
    table = load_file(folder / "time_table.safetensors")["time_projections"]
    table[:, start:stop] *= large
    save_file({"time_projections": table}, folder / "time_table.safetensors")
    seal_anew(folder)
    return CalibratedModel.open(folder)
