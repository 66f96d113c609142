from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import torch
from artifacts import TOKENS, tiny_calibrated, tiny_inputs, tiny_unet

from s2p_deploy.calib.quantized_denoiser import fake_quant_denoiser
from s2p_deploy.context import Context
from s2p_deploy.errors import GraphContractError, InputError
from s2p_deploy.export import Subgraphs, check_graph, export_graph
from s2p_deploy.export.canonical_graph import canonical_graph
from s2p_deploy.families import indexed_denoiser, time_table_of
from s2p_deploy.numerics import INT4, INT8, quantize
from s2p_deploy.records import CalibratedModel, TensorSpec, read_manifest
from s2p_deploy.records.optional_inputs import MOST_RANK, ImageSlot, ImageSlots, LoraSlots
from s2p_deploy.records.precision_plan import read_plan, write_plan
from tests.remembered_traces import trace_anew

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from s2p_deploy.export.canonical_graph import CanonicalGraph, GraphForm
    from s2p_deploy.records import ExportedGraph

# The bundled architecture: 73 layers, of which conv_in, conv_out and 8 text layers keep A16; the 63 others share 55 act
# quantizers (in 4 self-attentions q, k and v read one tensor). What is left of Mul, Add, Transpose and so on is the
# network's own.
FLOAT_NODES = {
    "Add": 48,
    "Concat": 4,
    "Conv": 33,
    "Gather": 1,
    "Gelu": 4,
    "GroupNormalization": 21,
    "LayerNormalization": 12,
    "MatMul": 56,
    "Mul": 37,
    "Reshape": 40,
    "Resize": 1,
    "Sigmoid": 17,
    "Slice": 8,
    "Softmax": 8,
    "Split": 4,
    "Transpose": 48,
    "Unsqueeze": 8,
}
QUANTIZED_EXTRA = {
    "QuantizeLinear": 55,
    "DequantizeLinear": 55 + 73,  # activation quantizers, weights
    "Mul": 55 + 63,  # c/s per quantizer, s/c per layer
    "Add": 31,  # biases that came out of Conv
    "Gather": 3,  # rows of act_scales, and the columns of either rank
    "Unsqueeze": 2,
    "Div": 4,
    "Split": 4,
}


def sqnr(candidate: np.ndarray, reference: np.ndarray) -> float:
    error = np.square(candidate.astype(np.float64) - reference).sum()
    return float(10 * np.log10(np.square(reference.astype(np.float64)).sum() / max(error, 1e-300)))


def feeds(graph: ExportedGraph, batch: int) -> dict[str, np.ndarray]:
    half = graph.dtype == "fp16"
    values = {k: v.astype(np.float16) if half and v.dtype == np.float32 else v for k, v in tiny_inputs(batch).items()}
    return values | {"act_scales": graph.scales.scales}


def node_counts(graph: ExportedGraph) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(graph.onnx_file, load_external_data=False).graph.node)


def captured(
    calibrated: CalibratedModel, modules: dict[str, str], batch: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Input and output of the fake-quant reference's modules, by key."""
    reference, seen = fake_quant_denoiser(calibrated), {}
    for key, path in modules.items():

        def note(_module: torch.nn.Module, args: tuple, output: object, key: str = key) -> None:
            first = output if isinstance(output, torch.Tensor) else output[0]
            seen[key] = (args[0].numpy(), first.numpy())

        reference.layer(path).register_forward_hook(note)
    reference(**{name: torch.from_numpy(value) for name, value in tiny_inputs(batch).items()})
    return seen


def test_inputs_and_outputs_are_those_of_the_contract(w8a8_graph: ExportedGraph) -> None:
    assert w8a8_graph.inputs == (
        TensorSpec("sample", "float32", ("batch", 4, 8, 8)),
        TensorSpec("timestep_index", "int64", ("batch",)),
        TensorSpec("encoder_hidden_states", "float32", ("batch", TOKENS, 48)),
        TensorSpec("act_scales", "float32", (1000, 55)),
    )
    assert w8a8_graph.outputs == (TensorSpec("noise_pred", "float32", ("batch", 4, 8, 8)),)


def test_quantized_graph_has_the_golden_node_counts(w8a8_graph: ExportedGraph) -> None:
    assert node_counts(w8a8_graph) == Counter(FLOAT_NODES) + Counter(QUANTIZED_EXTRA)


def test_four_bit_activations_add_one_clip_per_point(w4a4_graph: ExportedGraph) -> None:
    assert node_counts(w4a4_graph) == Counter(FLOAT_NODES) + Counter(QUANTIZED_EXTRA) + Counter(Clip=55) - Counter(
        Gather=1
    )  # input form


def test_half_graph_casts_ratios_once_and_nothing_else(w8a8_half_graph: ExportedGraph) -> None:
    assert node_counts(w8a8_half_graph) == Counter(FLOAT_NODES) + Counter(QUANTIZED_EXTRA) + Counter(Cast=4)
    assert {spec.name: spec.dtype for spec in w8a8_half_graph.inputs} == {
        "sample": "float16",
        "timestep_index": "int64",
        "encoder_hidden_states": "float16",
        "act_scales": "float32",
    }


def test_recipe_without_quantization_gives_the_plain_network(tmp_path: Path, run_onnx: Callable) -> None:
    calibrated = tiny_calibrated(tmp_path / "calib", "none", "none", recipe="fp")
    graph = export_graph(calibrated, tmp_path / "graph")
    assert [spec.name for spec in graph.inputs] == ["sample", "timestep_index", "encoder_hidden_states"]
    assert node_counts(graph) == FLOAT_NODES
    unet = tiny_unet()
    denoiser = indexed_denoiser(unet, time_table_of(unet, 1000))
    with torch.no_grad():
        expected = denoiser(**{k: torch.from_numpy(v) for k, v in tiny_inputs(3).items()}).numpy()
    assert sqnr(run_onnx(graph.onnx_file, tiny_inputs(3))["noise_pred"], expected) > 110


def test_input_form_binds_the_rows_of_a_schedule_and_leaves_the_table_out(
    w4a4: CalibratedModel, w4a4_graph: ExportedGraph, run_onnx: Callable
) -> None:
    shapes = {spec.name: spec.shape for spec in w4a4_graph.inputs}
    assert shapes["act_scales"] == ("timesteps", 55)
    assert shapes["time_projections"] == ("batch", 416)
    names = {item.name for item in onnx.load(w4a4_graph.onnx_file, load_external_data=False).graph.initializer}
    assert "time_projections" not in names
    block = w4a4_graph.blocks[2]
    source, expected = captured(w4a4, {"block": block.block}, batch=3)["block"]
    steps = tiny_inputs(3)["timestep_index"]
    bound = np.unique(steps)  # in this form a row is an index into what is bound
    values = {
        block.entering[0].tensor: source,
        "timestep_index": np.searchsorted(bound, steps),
        "act_scales": w4a4.scales.scales[bound],
        "time_projections": w4a4.time_table().projections[steps],
    }
    model = Subgraphs(w4a4_graph).block(block.block)
    assert [item.name for item in model.graph.input] == list(values)
    assert sqnr(run_onnx(model, values)[block.leaving[0].tensor], expected) > 110


@pytest.mark.parametrize(
    ("calibrated_name", "graph_name", "share", "fmt"),
    [
        ("w8a8", "w8a8_graph", 0.001, INT8),
        ("w8a8", "w8a8_half_graph", 0.02, INT8),
        ("w4a4", "w4a4_graph", 0.001, INT4),
    ],
)
def test_every_layer_gives_the_reference_codes(
    calibrated_name: str,
    graph_name: str,
    share: float,
    fmt: object,
    run_onnx: Callable,
    request: pytest.FixtureRequest,
) -> None:
    calibrated: CalibratedModel = request.getfixturevalue(calibrated_name)
    graph: ExportedGraph = request.getfixturevalue(graph_name)
    seen = captured(calibrated, {layer.name: layer.name for layer in graph.layers}, batch=4)
    values = feeds(graph, 4)
    rows = torch.from_numpy(values["timestep_index"])
    scales = torch.from_numpy(graph.scales.scales)
    quantized = [layer for layer in graph.layers if layer.codes]
    assert len(quantized) == 63
    parts = Subgraphs(graph)
    for layer in quantized:
        source, _ = seen[layer.name]
        scale = scales[rows, graph.scales.quantizers.index(layer.activation_quantizer)].view(
            -1, *[1] * (source.ndim - 1)
        )
        expected = quantize(torch.from_numpy(source), scale, fmt).numpy()
        codes = run_onnx(parts.layer(layer.name), values | {layer.input: source.astype(values["sample"].dtype)})[
            layer.codes
        ]
        assert np.abs(codes.astype(np.int32) - expected).max() <= 1, layer.name
        assert np.mean(codes != expected) <= share, layer.name


def test_every_block_agrees_when_it_is_fed_the_reference(
    w8a8: CalibratedModel, w8a8_graph: ExportedGraph, run_onnx: Callable
) -> None:
    graph = w8a8_graph
    modules = {block.block: block.block for block in graph.blocks if block.block != "output"}
    assert len(modules) == 15
    seen = captured(w8a8, modules, batch=4)
    parts, found = Subgraphs(graph), {}
    for block in graph.blocks[:-1]:
        source, expected = seen[block.block]
        given = run_onnx(parts.block(block.block), feeds(graph, 4) | {block.entering[0].tensor: source})
        output = given[block.leaving[0].tensor]
        found[block.block] = sorted(sqnr(*pair) for pair in zip(output, expected, strict=True))
    # Kernels round apart from processor to processor, so in some sample a code may fall on the other side of a tie.
    assert min(samples[1] for samples in found.values()) >= 50, found
    assert min(samples[-1] for samples in found.values()) >= 100, found
    assert np.median([samples[0] for samples in found.values()]) >= 100, found


def test_blocks_name_their_layers(w8a8_graph: ExportedGraph) -> None:
    layers = {block.block: block.layers for block in w8a8_graph.blocks}
    assert layers["conv_in"] == ("conv_in",)
    assert layers["output"] == ("conv_out",)
    assert layers["down_blocks.1.resnets.0"] == tuple(
        f"down_blocks.1.resnets.0.{name}" for name in ("conv1", "conv2", "conv_shortcut")
    )
    assert sum(len(names) for names in layers.values()) == len(w8a8_graph.layers) == 73


def test_mixed_rows_equal_single_calls_bit_for_bit(w8a8_graph: ExportedGraph, run_onnx: Callable) -> None:
    values = feeds(w8a8_graph, 2)
    assert values["timestep_index"][0] != values["timestep_index"][1]
    both = run_onnx(w8a8_graph.onnx_file, values)["noise_pred"]
    for index in range(2):
        alone = {name: value if name == "act_scales" else value[[index]] for name, value in values.items()}
        np.testing.assert_array_equal(run_onnx(w8a8_graph.onnx_file, alone)["noise_pred"][0], both[index])


def test_the_row_decides_the_scales(w8a8_graph: ExportedGraph, run_onnx: Callable) -> None:
    values = feeds(w8a8_graph, 1)
    layer = w8a8_graph.layers[1]
    model = Subgraphs(w8a8_graph).layer(layer.name)
    source = np.random.default_rng(0).standard_normal((1, 32, 8, 8)).astype(np.float32)
    column = w8a8_graph.scales.scales[:, w8a8_graph.scales.quantizers.index(layer.activation_quantizer)]
    codes = {}
    for row in (1, 981):
        given = values | {"timestep_index": np.asarray([row]), layer.input: source}
        codes[row] = run_onnx(model, given)[layer.codes]
        np.testing.assert_allclose(codes[row], np.clip(np.rint(source / column[row]), -128, 127), atol=1)
    assert not np.array_equal(codes[1], codes[981])


def test_weights_are_stored_packed(w4a4_graph: ExportedGraph) -> None:
    tensors = {item.name: item for item in onnx.load(w4a4_graph.onnx_file).graph.initializer}
    codes = tensors["mid_block.resnets.0.conv1/weight_quantizer/codes"]
    assert codes.data_type == onnx.TensorProto.INT4
    assert list(codes.dims) == [64, 64, 3, 3]
    assert len(codes.raw_data) == 64 * 64 * 9 // 2
    linear = tensors["mid_block.attentions.0.transformer_blocks.0.ff.net.2/weight_quantizer/codes"]
    assert list(linear.dims) == [256, 64]  # [in, out]
    assert tensors["conv_in/weight_quantizer/codes"].data_type == onnx.TensorProto.INT8


@pytest.mark.slow
def test_export_is_deterministic_and_tells_its_progress(
    w8a8: CalibratedModel, w8a8_graph: ExportedGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace_anew(monkeypatch)
    seen: list[tuple[int, int]] = []
    again = export_graph(
        w8a8, tmp_path / "again", context=Context(progress=lambda _stage, done, total: seen.append((done, total)))
    )
    assert [done for done, _ in seen] == list(range(1, seen[-1][1] + 1))
    assert again.manifest.files == w8a8_graph.manifest.files
    assert again.manifest.digest == w8a8_graph.manifest.digest


def test_files_and_manifest(w8a8: CalibratedModel, w8a8_graph: ExportedGraph) -> None:
    assert sorted(path.name for path in w8a8_graph.folder.iterdir()) == [
        "act_scales.safetensors",
        "denoiser.onnx",
        "denoiser.onnx.data",
        "graph.json",
        "manifest.json",
        "plan.yaml",
        "timesteps.json",
    ]
    content = w8a8_graph.manifest.content
    assert w8a8_graph.manifest.parents["calib"].digest == w8a8.manifest.digest
    assert content["denoiser_config"] == json.loads((w8a8.folder / "denoiser_config.json").read_text())
    assert (content["dtype"], content["opset"], content["time_table"]) == ("fp32", 21, "constant")
    name, column = w8a8.scales.quantizers[0], w8a8.scales.scales[:, 0]
    assert content["quantizers"][name]["lowest"] == column.min()
    assert content["quantizers"][name]["reference_scale"] == pytest.approx(np.sqrt(column.min() * column.max()))


def test_graph_carries_nothing_of_this_machine(w8a8_graph: ExportedGraph) -> None:
    content = w8a8_graph.onnx_file.read_bytes()
    for word in (b"site-packages", b"stack_trace", b"/home", b"s2p_deploy.families", str(w8a8_graph.folder).encode()):
        assert word not in content


def test_an_existing_folder_is_refused_before_any_work(w8a8: CalibratedModel, w8a8_graph: ExportedGraph) -> None:
    with pytest.raises(InputError, match="exists"):
        export_graph(w8a8, w8a8_graph.folder)
    assert read_manifest(w8a8_graph.folder).digest == w8a8_graph.manifest.digest


@pytest.mark.slow
def test_a_planned_layer_that_is_not_in_the_denoiser_is_named(w8a8: CalibratedModel, tmp_path: Path) -> None:
    text = (w8a8.folder / "plan.yaml").read_text()
    (tmp_path / "plan.yaml").write_text(text.replace("mid_block.resnets.0.conv1", "mid_block.resnets.7.conv1"))
    plan = read_plan(tmp_path / "plan.yaml")
    foreign = replace(w8a8, plan=plan)
    with pytest.raises(GraphContractError, match=r"layer mid_block\.resnets\.7\.conv1 has 0 Conv nodes"):
        export_graph(foreign, tmp_path / "graph")
    assert not (tmp_path / "graph").exists()


@pytest.mark.slow
def test_bundled_denoiser_has_the_same_nodes(tmp_path: Path) -> None:
    from s2p_deploy.families import resolve_base

    config = json.loads((resolve_base("shapes").folder / "unet" / "config.json").read_text())
    graph = export_graph(tiny_calibrated(tmp_path / "calib", "int4", config=config), tmp_path / "graph")
    assert node_counts(graph) == Counter(FLOAT_NODES) + Counter(QUANTIZED_EXTRA)
    check_graph(graph.onnx_file, graph.plan)
    write_plan(graph.plan, tmp_path / "plan.yaml")
    assert (tmp_path / "plan.yaml").read_bytes() == (graph.folder / "plan.yaml").read_bytes()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda _: {"lora": LoraSlots(MOST_RANK + 1, ())}, "lora.rank: input should be less than or equal to 1024"),
        (
            lambda _: {"images": ImageSlots(4, 1, (ImageSlot("mid", 1, 64, 0.25),))},
            "images: value error, the columns of attentions must follow each other",
        ),
        (lambda graph: {"blocks": (replace(graph.blocks[0], leaving=()),)}, "blocks.0.leaving: tuple should have at "),
        (lambda graph: {"reference_scales": dict.fromkeys(graph.reference_scales, 0.0)}, "reference_scale: input "),
    ],
)
def test_records_that_could_not_be_read_again_are_refused_before_anything_is_written(
    w8a8: CalibratedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[CanonicalGraph], dict[str, object]],
    said: str,
) -> None:
    def changed(calibrated: CalibratedModel, form: GraphForm) -> CanonicalGraph:
        graph = canonical_graph(calibrated, form)
        return replace(graph, **change(graph))

    def wrote(*_progress: object) -> None:
        pytest.fail("something is written")

    monkeypatch.setattr("s2p_deploy.export.exporter.canonical_graph", changed)
    with pytest.raises(InputError, match="could not be read again, so it is not written") as refused:
        export_graph(w8a8, tmp_path / "graph", context=Context(progress=wrote))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())
