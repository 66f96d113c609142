"""Graphs with low-rank branches: a LoRA in them equals one in the weights, for every sample its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from artifacts import tiny_calibrated, tiny_inputs

from s2p_deploy.engines.lora_bank import BranchMatrices, LoraBank
from s2p_deploy.errors import InputError
from s2p_deploy.export import export_graph
from s2p_deploy.export.lora_targets import LORA_KINDS, LoraRequest, kind_of
from s2p_deploy.families.transforms import apply_transforms, set_norm_shift
from s2p_deploy.records import TransformSpec
from s2p_deploy.records.optional_inputs import BOUND_MATRICES, LORA_STRENGTHS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from conftest import Run

    from s2p_deploy.families import IndexedDenoiser
    from s2p_deploy.records import CalibratedModel, ExportedGraph

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
EVERYTHING = LoraRequest(8, LORA_KINDS)
# a shift of each kind: of a linear layer, of a padded convolution, in the norm in front of layers that share it
SHIFTED = (f"{BLOCK}.ff.net.2", "down_blocks.0.resnets.0.conv1")
NORM, READERS = f"{BLOCK}.norm1", tuple(f"{BLOCK}.attn1.to_{name}" for name in "qkv")


def zeros(graph: ExportedGraph, batch: int) -> dict[str, np.ndarray]:
    shapes = {s.name: [batch if size == "batch" else int(size) for size in s.shape] for s in graph.optional_inputs}
    kinds = {spec.name: spec.dtype for spec in graph.optional_inputs}
    return {name: np.zeros(shape, kinds[name]) for name, shape in shapes.items()}


def bank_of(graph: ExportedGraph) -> tuple[LoraBank, dict[str, np.ndarray]]:
    """Returns a bank that binds its matrices in a dictionary."""
    assert graph.lora is not None
    bound: dict[str, np.ndarray] = {}
    sizes = {spec.name: int(spec.shape[0]) for spec in graph.optional_inputs if spec.name in BOUND_MATRICES}
    return LoraBank(graph.lora, "float32", sizes, bound.__setitem__), bound


def random_lora(graph: ExportedGraph, rank: int, seed: int) -> BranchMatrices:
    assert graph.lora is not None
    random = np.random.default_rng(seed)
    down, up = {}, {}
    for slot in graph.lora.layers:
        down[slot.layer] = random.standard_normal((rank, *slot.inputs)).astype(np.float32) * 0.1
        up[slot.layer] = random.standard_normal((slot.outputs, rank)).astype(np.float32) * 0.1
    return BranchMatrices(rank, down, up)


def with_fused(
    matrices: Mapping[str, tuple[BranchMatrices, float]], shifts: bool
) -> Callable[[IndexedDenoiser], TransformSpec]:
    """Returns a rewrite that adds LoRAs to a denoiser's weights, and shifts layers."""

    def rewrite(denoiser: IndexedDenoiser) -> TransformSpec:
        with torch.no_grad():
            for lora, strength in matrices.values():
                for path, down in lora.down.items():
                    weight = denoiser.network.get_submodule(path).weight
                    change = torch.from_numpy(lora.up[path] @ down.reshape(len(down), -1)).view_as(weight)
                    weight.add_(change, alpha=strength)
            if not shifts:
                return TransformSpec()
            spec = TransformSpec(shifted=SHIFTED, shifted_norms={NORM: READERS})
            apply_transforms(denoiser, spec)
            for number, path in enumerate(SHIFTED):
                layer = denoiser.network.get_submodule(path)
                layer.set_shift(torch.linspace(-0.5, 1 + number, len(layer.shift)))
            norm = denoiser.network.get_submodule(NORM)
            set_norm_shift(denoiser, NORM, READERS, torch.linspace(-1, 1, len(norm.bias)))
            return spec

    return rewrite


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> CalibratedModel:
    """In floating point, shifted, so that a branch must add products of shifts back."""
    return tiny_calibrated(tmp_path_factory.mktemp("fp") / "calib", "none", "none", rewrite=with_fused({}, shifts=True))


@pytest.fixture(scope="module")
def graph(plain_model: CalibratedModel) -> ExportedGraph:
    return export_graph(plain_model, plain_model.folder.parent / "lora", lora=EVERYTHING)


def test_a_lora_in_the_branches_equals_one_in_the_weights(graph: ExportedGraph, run_onnx: Run, tmp_path: Path) -> None:
    """Two LoRAs in three samples: none, one, and both at other strengths; beside the model whose weights have them."""
    bank, bound = bank_of(graph)
    loras = {"a": random_lora(graph, 3, 0), "b": random_lora(graph, 5, 1)}
    for name, lora in loras.items():
        bank.add(name, lora)
    samples: list[dict[str, float]] = [{}, {"b": 1.0}, {"a": -0.5, "b": 0.25}]
    strengths = bank.strengths(samples)
    found = run_onnx(graph.onnx_file, tiny_inputs(3) | bound | {LORA_STRENGTHS: strengths})["noise_pred"]
    for number, sample in enumerate(samples):
        fused = {name: (loras[name], strength) for name, strength in sample.items()}
        rewrite = with_fused(fused, shifts=False)
        model = tiny_calibrated(tmp_path / str(number) / "calib", "none", "none", rewrite=rewrite)
        whole = export_graph(model, tmp_path / str(number) / "graph")
        expected = run_onnx(whole.onnx_file, tiny_inputs(3))["noise_pred"]
        np.testing.assert_allclose(found[number], expected[number], atol=2e-4 * np.abs(expected).max())
    assert np.abs(found[1] - found[0]).max() > 0.1


@pytest.mark.parametrize("options", [{}, pytest.param({"sizes": "dynamic"}, marks=pytest.mark.slow)])
def test_zeros_change_no_bit(w8a8: CalibratedModel, options: dict[str, Any], run_onnx: Run, tmp_path: Path) -> None:
    plain, branched = (export_graph(w8a8, tmp_path / str(i), lora=i and EVERYTHING, **options) for i in (None, 1))
    values = tiny_inputs(3) | {"act_scales": plain.scales.scales}
    expected = run_onnx(plain.onnx_file, values)["noise_pred"]
    found = run_onnx(branched.onnx_file, values | zeros(branched, 3))["noise_pred"]
    np.testing.assert_array_equal(found, expected)


def test_zeros_change_no_bit_in_half_precision(
    w8a8: CalibratedModel, w8a8_half_graph: ExportedGraph, run_onnx: Run, tmp_path: Path
) -> None:
    branched = export_graph(w8a8, tmp_path / "half", dtype="fp16", lora=EVERYTHING)
    halves = {name: v.astype(np.float16) if v.dtype == np.float32 else v for name, v in tiny_inputs(2).items()}
    values = halves | {"act_scales": w8a8_half_graph.scales.scales}
    expected = run_onnx(w8a8_half_graph.onnx_file, values)["noise_pred"]
    np.testing.assert_array_equal(run_onnx(branched.onnx_file, values | zeros(branched, 2))["noise_pred"], expected)


def test_readers_of_one_tensor_share_one_product(graph: ExportedGraph) -> None:
    assert graph.lora is not None
    model = onnx.load(graph.onnx_file, load_external_data=False)
    products = {node.name for node in model.graph.node if node.name.endswith("/lora/product")}
    assert f"{READERS[0]}/lora/product" in products
    assert not products & {f"{reader}/lora/product" for reader in READERS[1:]}
    widths = {slot.layer: slot.width for slot in graph.lora.layers}
    assert [widths[reader] for reader in READERS] == [3, 3, 3]
    assert widths[f"{BLOCK}.attn2.to_q"] == 1
    assert widths[f"{BLOCK}.attn2.to_k"] > 1  # all that read the text


@pytest.mark.parametrize(
    ("path", "op", "kind"),
    [
        (f"{BLOCK}.attn1.to_out.0", "linear", "attention"),
        ("transformer_blocks.3.attn.add_q_proj", "linear", "attention"),
        (f"{BLOCK}.ff.net.0.proj", "linear", "feed-forward"),
        ("transformer_blocks.3.ff_context.net.2", "linear", "feed-forward"),
        ("mid_block.attentions.0.proj_in", "conv", "projections"),
        ("context_embedder", "linear", "projections"),
        ("mid_block.resnets.0.conv1", "conv", "convolutions"),
        ("up_blocks.0.upsamplers.0.conv", "conv", "convolutions"),
    ],
)
def test_layers_are_of_a_kind(path: str, op: str, kind: str) -> None:
    assert kind_of(path, op) == kind


def test_the_kinds_that_are_asked_for_have_branches(w8a8: CalibratedModel, tmp_path: Path) -> None:
    attention = export_graph(w8a8, tmp_path / "attention", lora=LoraRequest(4)).lora
    chosen = LoraRequest(4, paths=frozenset({f"{BLOCK}.ff.net.2", "conv_in"}))
    named = export_graph(w8a8, tmp_path / "named", lora=chosen).lora
    assert attention is not None
    assert named is not None
    assert {kind_of(slot.layer, slot.op) for slot in attention.layers} == {"attention"}
    assert len(attention.layers) == 8 * 4  # of four transformer layers
    assert {slot.layer for slot in named.layers} == chosen.paths


@pytest.mark.parametrize(
    ("rank", "kinds", "paths", "words"),
    [
        (0, ("attention",), None, "a LoRA rank of 0 must be 1 to 1024"),
        (4, ("attenton",), None, "'attenton' are no layers for LoRAs: name attention"),
        (4, (), {"down_blocks.0.resnets.0.time_emb_proj"}, "time_emb_proj, which is on the time path"),
        (4, (), None, "no layer of this denoiser is of the kinds"),
    ],
)
def test_what_cannot_be_is_refused(
    w8a8: CalibratedModel, rank: int, kinds: tuple[str, ...], paths: set[str] | None, words: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        export_graph(w8a8, tmp_path / "graph", lora=LoraRequest(rank, kinds, paths and frozenset(paths)))
    assert not (tmp_path / "graph").exists()
