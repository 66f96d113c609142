"""Graphs that take image prompts: zeros change no bit, every sample has its own, every adapter a softmax of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from artifacts import tiny_calibrated, tiny_inputs

from s2p_deploy.errors import InputError
from s2p_deploy.export import Subgraphs, export_graph
from s2p_deploy.export.lora_targets import LoraRequest
from s2p_deploy.families import apply_transforms
from s2p_deploy.families.transforms import SmoothedLinear
from s2p_deploy.records import TransformSpec

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import Run

    from s2p_deploy.export.canonical_graph import DType
    from s2p_deploy.families import IndexedDenoiser
    from s2p_deploy.records import CalibratedModel, ExportedGraph

WIDTH = 32 + 64 + 32 + 32  # of four cross-attentions
ABSENT = -1e4


@pytest.fixture(scope="module")
def graph(w8a8: CalibratedModel) -> ExportedGraph:
    return export_graph(w8a8, w8a8.folder.parent / "images", images=(4, 1))


@pytest.fixture(scope="module")
def pair(w8a8: CalibratedModel) -> ExportedGraph:
    """For two adapters."""
    return export_graph(w8a8, w8a8.folder.parent / "pair", images=(4, 2))


def given(graph: ExportedGraph, batch: int = 3) -> dict[str, Any]:
    return tiny_inputs(batch) | {"act_scales": graph.scales.scales}


def prompts(batch: int = 3, tokens: int = 4, seed: int = 0, dtype: str = "float32") -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    keys, values = (random.standard_normal((batch, tokens, WIDTH)).astype(dtype) for _ in range(2))
    bias, reach = np.zeros((batch, tokens), dtype), np.full((batch, 4), np.abs(values).max(), dtype)
    return {"image_keys": keys, "image_values": values, "image_bias": bias, "image_reach": reach}


def only(inputs: dict[str, np.ndarray], *names: str) -> dict[str, np.ndarray]:
    return {name: inputs[name] for name in names}


def nothing(prompt: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.zeros_like(value) for name, value in prompt.items()}


def test_the_graph_says_what_it_takes(graph: ExportedGraph, w8a8_graph: ExportedGraph) -> None:
    assert [spec.name for spec in graph.inputs[: len(w8a8_graph.inputs)]] == [spec.name for spec in w8a8_graph.inputs]
    shapes = {spec.name: spec.shape for spec in graph.optional_inputs}
    both = ("batch", 4, WIDTH)
    assert shapes == {"image_keys": both, "image_values": both, "image_bias": ("batch", 4), "image_reach": ("batch", 4)}
    assert graph.images is not None
    assert (graph.images.tokens, graph.images.adapters, graph.images.width) == (4, 1, WIDTH)
    heads = [slot.width // 4 for slot in graph.images.layers]  # four heads each
    assert [slot.scale for slot in graph.images.layers] == pytest.approx([width**-0.5 for width in heads])
    assert all(slot.layer.endswith("transformer_blocks.0.attn2") for slot in graph.images.layers)


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"sizes": "dynamic"}, marks=pytest.mark.slow), {"text_projections": "input"}]
)
def test_zeros_change_no_bit(w8a8: CalibratedModel, options: dict[str, Any], run_onnx: Run, tmp_path: Path) -> None:
    plain, taking = (export_graph(w8a8, tmp_path / str(i), images=i, **options) for i in (None, (3, 2)))
    values = given(plain)
    if plain.text:
        values |= run_onnx(plain.text_file, values)
    expected = run_onnx(plain.onnx_file, values)["noise_pred"]
    found = run_onnx(taking.onnx_file, values | nothing(prompts(tokens=6)))["noise_pred"]
    np.testing.assert_array_equal(found, expected)


def test_zeros_change_no_bit_in_half_precision(
    w8a8: CalibratedModel, w8a8_half_graph: ExportedGraph, run_onnx: Run, tmp_path: Path
) -> None:
    taking = export_graph(w8a8, tmp_path / "half", dtype="fp16", images=(4, 1))
    values = {
        name: value.astype(np.float16) if value.dtype == np.float32 and name != "act_scales" else value
        for name, value in given(taking).items()
    }
    expected = run_onnx(w8a8_half_graph.onnx_file, values)["noise_pred"]
    prompt = prompts(dtype="float16")
    np.testing.assert_array_equal(run_onnx(taking.onnx_file, values | nothing(prompt))["noise_pred"], expected)
    prompt["image_bias"][:, 2:] = ABSENT
    assert np.isfinite(run_onnx(taking.onnx_file, values | prompt)["noise_pred"]).all()


def test_every_sample_has_its_own(graph: ExportedGraph, run_onnx: Run) -> None:
    values, prompt = given(graph), prompts()
    without = run_onnx(graph.onnx_file, values | nothing(prompt))["noise_pred"]
    alone = {name: np.where(np.arange(3).reshape(-1, *[1] * (v.ndim - 1)) == 1, v, 0) for name, v in prompt.items()}
    found = run_onnx(graph.onnx_file, values | alone)["noise_pred"]
    np.testing.assert_array_equal(found[[0, 2]], without[[0, 2]])
    assert np.abs(found[1] - without[1]).max() > 0.1


def test_places_without_a_token_take_no_part(graph: ExportedGraph, w8a8: CalibratedModel, run_onnx: Run) -> None:
    short = export_graph(w8a8, w8a8.folder.parent / "short", images=(3, 1))
    values, prompt = given(graph), prompts()
    first = {name: value[:, :3] for name, value in prompt.items()} | only(prompt, "image_reach")
    expected = run_onnx(short.onnx_file, values | first)["noise_pred"]
    prompt["image_bias"][:, 3] = ABSENT
    np.testing.assert_allclose(run_onnx(graph.onnx_file, values | prompt)["noise_pred"], expected, atol=1e-5)
    prompt["image_bias"][:] = ABSENT  # of nothing but such places
    assert np.isfinite(run_onnx(graph.onnx_file, values | prompt)["noise_pred"]).all()


def test_each_adapter_has_a_softmax_of_its_own(graph: ExportedGraph, pair: ExportedGraph, run_onnx: Run) -> None:
    values, prompt = given(graph), prompts()
    twice = prompt | {name: 2 * prompt[name] for name in ("image_values", "image_reach")}
    expected = run_onnx(graph.onnx_file, values | twice)["noise_pred"]
    both = {name: np.concatenate([value, value], 1) for name, value in prompt.items()} | only(twice, "image_reach")
    np.testing.assert_allclose(run_onnx(pair.onnx_file, values | both)["noise_pred"], expected, atol=1e-4)
    first = both | {"image_values": both["image_values"] * (np.arange(8) < 4)[:, None]} | only(prompt, "image_reach")
    expected = run_onnx(graph.onnx_file, values | prompt)["noise_pred"]
    np.testing.assert_allclose(run_onnx(pair.onnx_file, values | first)["noise_pred"], expected, atol=1e-4)


def test_a_block_is_cut_out_with_its_image_prompts(graph: ExportedGraph) -> None:
    block = next(block.block for block in graph.blocks if "mid_block.attentions" in block.block)
    taken = {value.name for value in Subgraphs(graph).block(block).graph.input}
    assert {"image_keys", "image_values", "image_bias", "image_reach"} <= taken


def smoothed_by_half(denoiser: IndexedDenoiser) -> TransformSpec:
    """Divides what the layer behind every cross-attention reads by a half in one channel, so it reads the double."""
    layers = dict(denoiser.network.named_modules())
    spec = TransformSpec(smoothed=tuple(path for path in layers if path.endswith("attn2.to_out.0")))
    apply_transforms(denoiser, spec)
    for path in spec.smoothed:
        layer = denoiser.network.get_submodule(path)
        assert isinstance(layer, SmoothedLinear)
        factor = layer.factor.clone()
        factor[0] = 0.5
        layer.set_factor(factor)
    return spec


@pytest.mark.parametrize(
    ("activations", "rewrite", "dtype"),
    [("int8", None, "fp32"), ("int8", None, "fp16"), ("int4", None, "fp32"), ("int8", smoothed_by_half, "fp32")],
)
def test_the_grid_behind_an_attention_grows_by_what_prompts_can_add(
    activations: str,
    rewrite: Callable[[IndexedDenoiser], TransformSpec] | None,
    dtype: DType,
    run_onnx: Run,
    tmp_path: Path,
) -> None:
    """Samples of one batch by their own reach: what a prompt adds is not clipped, and without one all is as it was."""
    model = tiny_calibrated(tmp_path / "calib", activations=activations, rewrite=rewrite)
    graph = export_graph(model, tmp_path / "graph", dtype=dtype, images=(4, 1))
    assert graph.images is not None
    slot, largest = graph.images.layers[1], {"int8": 127, "int4": 7}[activations]
    layer = next(each for each in graph.layers if each.activation_quantizer == slot.quantizer)
    scale = float(graph.scales.scales[7, graph.scales.quantizers.index(str(slot.quantizer))])
    own, reach = largest * scale, 2.5 * largest * scale
    values = np.zeros((3, 16, slot.width))
    values[:, 0, 0] = own + np.array([0, reach, reach]) * (2 if rewrite else 1)
    kind = {"fp32": np.float32, "fp16": np.float16}[dtype]
    found = run_onnx(
        Subgraphs(graph).layer(layer.name),
        {
            layer.input: values.astype(kind),
            "timestep_index": np.full(3, 7),
            "act_scales": graph.scales.scales,
            "image_reach": (np.array([0, reach, 0])[:, None] * np.eye(4)[1]).astype(kind),
        },
    )
    assert found[str(layer.codes)][:, 0, 0].tolist() == [largest] * 3
    added = (found[layer.output][:, 0] - found[layer.output][:, 1]).astype(np.float64)  # of the one value
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == "fp32" else {"rtol": 4e-3, "atol": 4e-3}
    np.testing.assert_allclose(added[1], added[0] * values[1, 0, 0] / own, **tolerance)
    np.testing.assert_allclose(added[2], added[0], **tolerance)


def test_where_nothing_is_quantized_there_is_no_reach(tmp_path: Path) -> None:
    model = tiny_calibrated(tmp_path / "calib", "int8", "none")
    graph = export_graph(model, tmp_path / "graph", images=(4, 1))
    assert {spec.name for spec in graph.optional_inputs} == {"image_keys", "image_values", "image_bias"}
    assert graph.images is not None
    assert graph.images.quantizers == ()


def test_beside_low_rank_branches(w8a8: CalibratedModel, w8a8_graph: ExportedGraph, run_onnx: Run) -> None:
    """The branch of to_out reads what the image prompt added to, as the layer does."""
    both = export_graph(w8a8, w8a8.folder.parent / "both", images=(4, 1), lora=LoraRequest(2))
    nodes = onnx.load(both.onnx_file, load_external_data=False).graph.node
    made_by = {name: node for node in nodes for name in node.output}
    branches = [node for node in nodes if node.name.endswith("attn2.to_out.0/lora/product")]
    assert [made_by[node.input[0]].name.rpartition("/")[2] for node in branches] == ["sum"] * 4
    values = given(both)
    zeros = {
        spec.name: np.zeros([3 if d == "batch" else int(d) for d in spec.shape], np.float32)
        for spec in both.optional_inputs
    }
    expected = run_onnx(w8a8_graph.onnx_file, values)["noise_pred"]
    np.testing.assert_array_equal(run_onnx(both.onnx_file, values | zeros)["noise_pred"], expected)
    random = np.random.default_rng(3)
    loras = {
        name: random.standard_normal(value.shape).astype(np.float32)
        for name, value in zeros.items()
        if name.startswith("lora")
    }
    with_lora = run_onnx(both.onnx_file, values | zeros | loras)["noise_pred"]
    assert np.abs(run_onnx(both.onnx_file, values | zeros | loras | prompts())["noise_pred"] - with_lora).max() > 0.01


@pytest.mark.parametrize(
    ("images", "words"), [((0, 1), "0 tokens of an image prompt"), ((4, 17), "17 IP-Adapters at once: 1 to 16")]
)
def test_numbers_out_of_range_are_refused(
    w8a8: CalibratedModel, images: tuple[int, int], words: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        export_graph(w8a8, tmp_path / "graph", images=images)
    assert list(tmp_path.iterdir()) == []
