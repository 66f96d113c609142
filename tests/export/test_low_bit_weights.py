"""Weights of few levels go through export as INT4, from packed codes too."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest
import torch
from artifacts import tiny_calibrated, tiny_inputs

from s2p_deploy.calib.quantized_denoiser import fake_quant_denoiser
from s2p_deploy.export import export_graph
from tests.packed_model import packed_copy

if TYPE_CHECKING:
    from collections.abc import Callable

    from s2p_deploy.records import CalibratedModel, ExportedGraph


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> CalibratedModel:
    folder = tmp_path_factory.mktemp("levels9")
    return packed_copy(tiny_calibrated(folder / "plain", "levels9"), folder / "packed")


@pytest.fixture(scope="module")
def graph(packed: CalibratedModel) -> ExportedGraph:
    return export_graph(packed, packed.folder.parent / "graph")


def test_the_graph_computes_what_the_packed_model_does(
    packed: CalibratedModel, graph: ExportedGraph, run_onnx: Callable
) -> None:
    inputs = tiny_inputs(4)
    expected = fake_quant_denoiser(packed)(**{name: torch.from_numpy(value) for name, value in inputs.items()}).numpy()
    found = run_onnx(graph.onnx_file, inputs | {"act_scales": graph.scales.scales})["noise_pred"]
    error = np.square(found - expected).sum() / np.square(expected).sum()
    assert 10 * np.log10(error) < -35  # rounding flips amplify on random weights; one wrong code would be 0 to -20


def test_codes_are_stored_in_four_bits_and_use_all_levels(packed: CalibratedModel, graph: ExportedGraph) -> None:
    model = ir.load(graph.onnx_file)
    for site in graph.sites:
        if site.weights != "levels9":
            continue
        stored = model.graph.initializers[site.weight].const_value
        assert stored.dtype == ir.DataType.INT4
        codes = stored.numpy().astype(np.int8)
        assert (codes.min(), codes.max()) == (-4, 4), site.site
        scale = packed.weight_scales()[site.site].reshape(-1)
        weight = packed.tensor(f"network.{site.site}.weight")
        dense = codes if site.op == "conv" else codes.T
        np.testing.assert_array_equal(dense * scale.reshape(-1, *(1,) * (weight.ndim - 1)), weight)
