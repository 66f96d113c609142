"""Engines whose products of the text are an input: callers give the text as ever, and it is projected once per text."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from s2p_deploy.engines import build_engine, load_engine
from s2p_deploy.engines.conditioning import TextProjections
from s2p_deploy.engines.lora_bank import BranchMatrices, LoraBank
from s2p_deploy.engines.runner import BoundRunner, BoundTensorRunner, ClosingRunner
from s2p_deploy.errors import InputError, IntegrityError
from s2p_deploy.export import export_graph
from s2p_deploy.export.lora_targets import LoraRequest
from s2p_deploy.records import CalibratedModel, Engine, ExportedGraph, TensorSpec, TimestepTable
from s2p_deploy.records.artifacts import _sealed_text, file_digest
from s2p_deploy.records.optional_inputs import LoraSlot, LoraSlots
from tests.artifacts import tiny_calibrated, tiny_inputs

TEXT = TensorSpec("encoder_hidden_states", "float32", ("batch", 2, 3))
INPUTS = (TensorSpec("timestep_index", "int64", ("batch",)), TensorSpec("text_projections", "float32", ("batch", 2, 5)))
ROWS = TimestepTable("DDIMScheduler", {}, 3, (1, 501, 981), np.linspace(0.03, 1.5, 1000))
EACH = 2 * 5 * 4  # bytes of one text's products


class Counted:
    """Products [1, 2, 5] of a text [1, 2, 3], and how often that was asked.

    They are the text's sum, and that of every LoRA's down matrix times its strength.
    """

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, states: np.ndarray, loras: Mapping[str, np.ndarray]) -> np.ndarray:
        assert states.shape == (1, 2, 3)
        self.calls += 1
        branch = (loras["lora_down"].reshape(3, 2) * loras["lora_strengths"]).sum() if loras else 0
        return np.full((1, 2, 5), states.sum() + branch, np.float32)


class Echo(ClosingRunner):
    """Gives back what it was given."""

    def infer(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(inputs)

    def infer_tensors(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(inputs)

    def close(self) -> None: ...


def texts(*marks: float) -> np.ndarray:
    return np.asarray(marks, np.float32)[:, None, None] * np.ones((1, 2, 3), np.float32)


def test_a_text_is_projected_once() -> None:
    count = Counted()
    projections = TextProjections(count, TEXT)
    for marks in ((1, 2), (2, 1), (1, 1, 3), (3,)):
        found = projections.of(texts(*marks))
        assert found[:, 0, 0].tolist() == [6 * mark for mark in marks]
    assert count.calls == 3


def test_the_text_used_longest_ago_goes_first() -> None:
    count = Counted()
    projections = TextProjections(count, TEXT, most_bytes=2 * EACH)
    for mark in (1, 2, 1, 3):  # 2 goes
        projections.of(texts(mark))
    assert count.calls == 3
    projections.of(texts(1))
    assert count.calls == 3
    projections.of(texts(2))
    assert count.calls == 4


def test_a_batch_above_the_limit_is_kept_whole() -> None:
    count = Counted()
    projections = TextProjections(count, TEXT, most_bytes=EACH)
    for _ in range(3):
        projections.of(texts(1, 2, 3))
    assert count.calls == 3


def test_callers_give_the_text_and_the_engine_gets_its_products() -> None:
    runner = BoundRunner(Echo(), INPUTS, ROWS, texts=TextProjections(Counted(), TEXT))
    assert [spec.name for spec in runner.inputs] == ["timestep_index", "encoder_hidden_states"]
    found = runner.infer({"timestep_index": np.asarray([1, 2]), "encoder_hidden_states": texts(1, 2)})
    assert set(found) == {"timestep_index", "text_projections"}
    assert found["text_projections"].shape == (2, 2, 5)
    with pytest.raises(InputError, match="encoder_hidden_states has shape"):
        runner.infer({"timestep_index": np.asarray([1]), "encoder_hidden_states": np.zeros((1, 2, 4))})


@pytest.mark.parametrize("counts_writes", [True, False])
def test_tensors_are_looked_at_again_only_when_they_were_written_to(counts_writes: bool) -> None:
    count = Counted()
    seen: list[int] = []

    class Watched(TextProjections):
        def of(self, states: np.ndarray, strengths: np.ndarray | None = None) -> np.ndarray:
            seen.append(1)
            return super().of(states, strengths)

    runner = BoundTensorRunner(Echo(), INPUTS, ROWS, texts=Watched(count, TEXT))
    with torch.inference_mode(not counts_writes):
        states = torch.from_numpy(texts(1, 2)).clone()
        rows = torch.tensor([1, 2])
        for _ in range(3):
            found = runner.infer_tensors({"timestep_index": rows, "encoder_hidden_states": states.detach()})
            assert found["text_projections"][:, 0, 0].tolist() == [6, 12]
        assert len(seen) == (1 if counts_writes else 3)
        states.mul_(2)
        found = runner.infer_tensors({"timestep_index": rows, "encoder_hidden_states": states.detach()})
        assert found["text_projections"][:, 0, 0].tolist() == [12, 24]
        other = runner.infer_tensors({"timestep_index": rows, "encoder_hidden_states": states[[1, 0]]})
        assert other["text_projections"][:, 0, 0].tolist() == [24, 12]
    assert count.calls == 3


def bank() -> LoraBank:
    """One branch of two ranks, in which LoRAs ``a`` and ``b`` fit side by side."""
    made = LoraBank(
        LoraSlots(2, (LoraSlot("to_k", "linear", (3,), 5, 0, 1, 0),)),
        "float32",
        {"lora_down": 6, "lora_up": 10},
        lambda _name, _values: None,
    )
    for name, number in (("a", 10), ("b", 100), ("c", 1000)):
        made.add(name, matrices({"to_k": np.full((1, 3), number, np.float32)}, {"to_k": np.ones((5, 1), np.float32)}))
    return made


def matrices(down: dict[str, np.ndarray], up: dict[str, np.ndarray]) -> BranchMatrices:
    return BranchMatrices(max(map(len, down.values())), down, up)


def test_samples_are_projected_with_their_own_loras_once_until_the_matrices_change() -> None:
    count, loras = Counted(), bank()
    projections = TextProjections(count, TEXT, loras)

    def found(*samples: dict[str, float]) -> list[float]:
        states = texts(*[1] * len(samples))
        return projections.of(states, loras.strengths(samples))[:, 0, 0].tolist()

    for _ in range(2):
        assert found({}, {"a": 1}, {"a": 2}, {"a": 1}) == [6, 36, 66, 36]
    assert count.calls == 3
    assert found({}, {"a": 1, "b": 1}) == [6, 336]
    assert count.calls == 4, "without LoRAs their matrices do not matter"
    assert found({"c": 1}) == [3006], "in the ranks of another"
    assert found({"a": 1}) == [36]
    assert projections.of(texts(1))[0, 0, 0] == 6


def test_tensors_are_projected_again_where_loras_act_otherwise() -> None:
    loras = bank()
    inputs = (
        TensorSpec("sample", "float32", ("batch", 1)),
        *INPUTS,
        TensorSpec("lora_strengths", "float32", ("batch", 2)),
    )
    runner = BoundTensorRunner(Echo(), inputs, ROWS, texts=TextProjections(Counted(), TEXT, loras))
    given = {"timestep_index": torch.tensor([1, 2]), "encoder_hidden_states": torch.from_numpy(texts(1, 2))}
    given["sample"] = torch.zeros(2, 1)

    def found(*samples: dict[str, float]) -> list[float]:
        return products(given | {"lora_strengths": torch.from_numpy(loras.strengths(samples))})

    def products(inputs: dict[str, torch.Tensor]) -> list[float]:
        return runner.infer_tensors(inputs)["text_projections"][:, 0, 0].tolist()

    assert products(given) == [6, 12]
    assert found({"a": 1}, {}) == [36, 12]
    assert found({}, {"a": 1}) == [6, 42]
    assert found({}, {"b": 1}) == [6, 312]
    same = loras.strengths([{}, {"b": 1}])
    loras.add("b", matrices({"to_k": np.full((1, 3), 7, np.float32)}, {"to_k": np.ones((5, 1), np.float32)}))
    assert found({}, {"b": 1}) == [6, 33], f"with other matrices at the same strengths {same}"
    assert products(given) == [6, 12]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> CalibratedModel:
    return tiny_calibrated(tmp_path_factory.mktemp("model") / "calib", "int4")


@pytest.fixture(scope="module")
def graphs(calibrated: CalibratedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExportedGraph]:
    folder = tmp_path_factory.mktemp("graphs")
    return {form: export_graph(calibrated, folder / form, text_projections=form) for form in ("graph", "input")}


@pytest.fixture(scope="module")
def engine(graphs: dict[str, ExportedGraph]) -> Engine:
    return build_engine(graphs["input"], graphs["input"].folder.parent / "engine", backend="onnxruntime")


def counted_runs(runner: BoundRunner, batches: list[np.ndarray]) -> int:
    """How often the text graph runs while the batches of texts are asked for."""
    assert runner.texts is not None
    project, calls = runner.texts._project, []
    runner.texts._project = lambda states, loras: (calls.append(1), project(states, loras))[1]
    for states in batches:
        runner.infer(tiny_inputs(len(states)) | {"encoder_hidden_states": states})
    return len(calls)


def test_an_engine_gives_the_bits_of_the_whole_graphs(graphs: dict[str, ExportedGraph], engine: Engine) -> None:
    whole = build_engine(graphs["graph"], graphs["graph"].folder.parent / "whole", backend="onnxruntime")
    with load_engine(engine, graphs["input"]) as apart, load_engine(whole) as together:
        assert apart.inputs == together.inputs
        expected = together.infer(tiny_inputs(3))["noise_pred"]
        for _ in range(2):
            assert np.array_equal(apart.infer(tiny_inputs(3))["noise_pred"], expected)


def test_a_prompts_steps_run_the_text_graph_once(engine: Engine) -> None:
    states = tiny_inputs(3)["encoder_hidden_states"]
    with load_engine(engine) as runner:
        assert counted_runs(runner, [states, states, states[:2], states[::-1]]) == 3


def test_the_text_graphs_layers_are_reported(graphs: dict[str, ExportedGraph], engine: Engine) -> None:
    apart = {layer.name for layer in graphs["input"].layers if layer.graph == "text"}
    reported = {layer.name: layer for layer in engine.layers}
    assert set(reported) == {layer.name for layer in graphs["input"].layers}
    for name in apart:
        found = reported[name]
        assert (found.weight_storage_bits, found.lowering, found.compute) == (4, "weight_only", "fp32")
    assert engine.takes_text_projections
    assert {"text.onnx", "text.onnx.data"} <= set(engine.manifest.files)


@pytest.mark.slow
def test_other_backends_take_it_too(graphs: dict[str, ExportedGraph]) -> None:
    outputs = []
    for form, graph in graphs.items():
        with load_engine(build_engine(graph, graph.folder.parent / f"openvino-{form}", backend="openvino")) as runner:
            outputs.append(runner.infer(tiny_inputs(3))["noise_pred"])
    assert np.abs(outputs[1] - outputs[0]).max() <= 1e-2 * np.abs(outputs[0]).max()  # codes at a rounding's edge flip


KEYS = frozenset(f"mid_block.attentions.0.transformer_blocks.0.attn2.to_{end}" for end in "kv")


def random_matrices(slots: LoraSlots, seed: int) -> BranchMatrices:
    random = np.random.default_rng(seed)
    return matrices(
        {slot.layer: 0.5 * random.standard_normal((2, *slot.inputs)) for slot in slots.layers},
        {slot.layer: 0.5 * random.standard_normal((slot.outputs, 2)) for slot in slots.layers},
    )


def drawn(engine: Engine) -> list[np.ndarray]:
    """Predictions without LoRAs, and with two that act otherwise in every sample, before and after one is replaced."""
    with load_engine(engine) as runner:
        loras, inputs = runner.loras, tiny_inputs(3)
        assert loras is not None
        for number, name in enumerate("ab"):
            loras.add(name, random_matrices(loras.slots, number))
        found = [runner.infer(inputs)["noise_pred"]]
        samples = [{"a": 1.0}, {}, {"a": 0.5, "b": -1.0}]
        found.append(runner.infer(inputs | {"lora_strengths": loras.strengths(samples)})["noise_pred"])
        loras.add("a", random_matrices(loras.slots, 2))
        found.append(runner.infer(inputs | {"lora_strengths": loras.strengths(samples)})["noise_pred"])
        return found


@pytest.mark.parametrize(
    ("backend", "paths"),
    [
        ("onnxruntime", None),
        pytest.param("onnxruntime", KEYS, marks=pytest.mark.slow),  # no branch is left in the denoiser's graph
        pytest.param("openvino", None, marks=pytest.mark.slow),
        pytest.param("openvino", KEYS, marks=pytest.mark.slow),
    ],
)
def test_loras_act_as_in_the_whole_graphs(
    calibrated: CalibratedModel,
    engine: Engine,
    graphs: dict[str, ExportedGraph],
    tmp_path: Path,
    backend: str,
    paths: frozenset[str] | None,
) -> None:
    outputs = {}
    for form in ("graph", "input"):
        graph = export_graph(calibrated, tmp_path / form, text_projections=form, lora=LoraRequest(4, paths=paths))
        outputs[form] = drawn(build_engine(graph, tmp_path / f"engine-{form}", backend=backend))
    tolerance = 0 if backend == "onnxruntime" else 1e-2  # codes at a rounding's edge flip
    for found, expected in zip(outputs["input"], outputs["graph"], strict=True):
        assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()
    without, first, second = outputs["input"]
    assert np.array_equal(first[1], without[1])
    assert min(np.abs(first[[0, 2]] - without[[0, 2]]).max(), np.abs(second - first).max()) > 1e-2
    own = backend == engine.backend
    plain = engine if own else build_engine(graphs["input"], tmp_path / "plain", backend=backend)
    with load_engine(plain) as runner:
        assert np.array_equal(runner.infer(tiny_inputs(3))["noise_pred"], without)


@pytest.mark.parametrize("kind", ["missing", "no ONNX", "another graph", "other width", "changed"])
def test_what_is_no_text_graph_is_refused(engine: Engine, tmp_path: Path, kind: str) -> None:
    copy, name = tmp_path / "copy", "text.onnx"
    shutil.copytree(engine.folder, copy)
    if kind == "other width":
        model = onnx.load(copy / name, load_external_data=False)
        joined = next(node for node in model.graph.node if node.op_type == "Concat")
        del joined.input[0]
        model.graph.output[0].type.tensor_type.shape.dim[2].dim_param = "any"
        (copy / name).write_bytes(model.SerializeToString())
    else:
        (copy / name).write_bytes(b"nothing" if kind in {"no ONNX", "changed"} else other_model())
    files = {file: file_digest(copy / file) for file in engine.manifest.files if kind != "missing" or file != name}
    if kind == "changed":
        files = dict(engine.manifest.files)
    (copy / "manifest.json").write_text(_sealed_text(asdict(replace(engine.manifest, files=files))))
    with pytest.raises(IntegrityError, match=r"text\.onnx|no ONNX model|text_projections"):
        used(copy)


def used(folder: Path) -> None:
    with load_engine(Engine.open(folder), tried=True) as runner:
        runner.infer(tiny_inputs(2))


def other_model() -> bytes:
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    infos = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 2]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "other", infos[:1], infos[1:])
    opset = [onnx.helper.make_opsetid("", 21)]
    return onnx.helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()
