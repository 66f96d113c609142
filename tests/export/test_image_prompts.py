"""Graphs that take image prompts: zeros change no bit, every sample has its own, every adapter a softmax of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from artifacts import tiny_inputs

from s2p_deploy.errors import InputError
from s2p_deploy.export import Subgraphs, export_graph
from s2p_deploy.export.lora_targets import LoraRequest

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Run

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
    return {"image_keys": keys, "image_values": values, "image_bias": np.zeros((batch, tokens), dtype)}


def nothing(prompt: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.zeros_like(value) for name, value in prompt.items()}


def test_the_graph_says_what_it_takes(graph: ExportedGraph, w8a8_graph: ExportedGraph) -> None:
    assert [spec.name for spec in graph.inputs[: len(w8a8_graph.inputs)]] == [spec.name for spec in w8a8_graph.inputs]
    shapes = {spec.name: spec.shape for spec in graph.optional_inputs}
    both = ("batch", 4, WIDTH)
    assert shapes == {"image_keys": both, "image_values": both, "image_bias": ("batch", 4)}
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
    expected = run_onnx(short.onnx_file, values | {name: value[:, :3] for name, value in prompt.items()})["noise_pred"]
    prompt["image_bias"][:, 3] = ABSENT
    np.testing.assert_allclose(run_onnx(graph.onnx_file, values | prompt)["noise_pred"], expected, atol=1e-5)
    prompt["image_bias"][:] = ABSENT  # of nothing but such places
    assert np.isfinite(run_onnx(graph.onnx_file, values | prompt)["noise_pred"]).all()


def test_each_adapter_has_a_softmax_of_its_own(graph: ExportedGraph, pair: ExportedGraph, run_onnx: Run) -> None:
    values, prompt = given(graph), prompts()
    twice = prompt | {"image_values": 2 * prompt["image_values"]}
    expected = run_onnx(graph.onnx_file, values | twice)["noise_pred"]
    both = {name: np.concatenate([value, value], 1) for name, value in prompt.items()}
    np.testing.assert_allclose(run_onnx(pair.onnx_file, values | both)["noise_pred"], expected, atol=1e-4)
    first = both | {"image_values": both["image_values"] * (np.arange(8) < 4)[:, None]}
    expected = run_onnx(graph.onnx_file, values | prompt)["noise_pred"]
    np.testing.assert_allclose(run_onnx(pair.onnx_file, values | first)["noise_pred"], expected, atol=1e-4)


def test_a_block_is_cut_out_with_its_image_prompts(graph: ExportedGraph) -> None:
    block = next(block.block for block in graph.blocks if "mid_block.attentions" in block.block)
    taken = {value.name for value in Subgraphs(graph).block(block).graph.input}
    assert {"image_keys", "image_values", "image_bias"} <= taken


def test_beside_low_rank_branches(w8a8: CalibratedModel, w8a8_graph: ExportedGraph, run_onnx: Run) -> None:
    """The branch of to_out reads what the image prompt added to."""
    both = export_graph(w8a8, w8a8.folder.parent / "both", images=(4, 1), lora=LoraRequest(2))
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
