"""Batch sizes of an engine for which none were asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest
import torch

from benchmarks.full_size.pipeline import ORIGINALS
from s2p_deploy.child_process import Limits
from s2p_deploy.engines import BuildOptions, ShapeProfile, backend_by_name
from s2p_deploy.engines.build import check_build, default_profile_of
from s2p_deploy.engines.profile import largest_batch, largest_tensor
from s2p_deploy.export.passes.fold_constants import FoldConstants
from s2p_deploy.export.tracing import trace_denoiser
from s2p_deploy.families import TimePath, network_config
from s2p_deploy.records import TimestepTable
from s2p_deploy.records.calibrated_model import TimeTable, TransformSpec
from tests.engines.stand_in_gpu import FREE, stand_in_gpus

if TYPE_CHECKING:
    from pathlib import Path

    from tests.engines.conftest import GraphOf

HALF = 2  # bytes
# of a sample: latent positions, and the attention scores of all heads between all tokens, the largest tensor
SIZES = {"SD v1-4": (64 * 64, 8 * 4096**2 * HALF), "SDXL": (128 * 128, 10 * 4096**2 * HALF)}
WEIGHTS = {"SD v1-4": (1.72e9, 0.86e9), "SDXL": (5.13e9, 2.57e9)}  # in fp16 and in INT8


@pytest.mark.parametrize(
    ("model", "free", "largest"),
    [
        ("SD v1-4", 80e9, 32),
        ("SD v1-4", 24e9, 16),
        ("SD v1-4", 8e9, 4),
        ("SDXL", 80e9, 16),
        ("SDXL", 24e9, 8),
        ("SDXL", 8e9, 4),
    ],
)
def test_the_largest_batch_follows_from_the_graphs_sizes_and_the_memory(model: str, free: float, largest: int) -> None:
    positions, scores = SIZES[model]
    for weights in WEIGHTS[model]:
        for about in (0.95, 1.0, 1.05):  # a card has a little more or less than its name says
            assert largest_batch(int(about * free), int(weights), 4 * scores, positions) == largest


def graph(*values: tuple[str, list[int | str | None], ir.DataType]) -> ir.Model:
    """Nodes one after the other, each with an output of that shape and type."""
    source = ir.Value(
        name="sample", shape=ir.Shape(["batch", 4, "height", "width"]), type=ir.TensorType(ir.DataType.FLOAT)
    )
    nodes, before = [], source
    for kind, shape, dtype in values:
        out = ir.Value(name=f"v{len(nodes)}", shape=ir.Shape(shape), type=ir.TensorType(dtype))
        nodes.append(ir.Node("", kind, [before], outputs=[out]))
        before = out
    return ir.Model(ir.Graph([source], [before], nodes=nodes, opset_imports={"": 21}), ir_version=10)


def test_the_largest_tensor_is_a_samples_not_the_weights() -> None:
    half, single = ir.DataType.FLOAT16, ir.DataType.FLOAT
    model = graph(
        ("DequantizeLinear", [4096, 4096], single),  # a weight
        ("Conv", ["batch", 8, "height", "width"], half),
        ("MatMul", ["batch", 2, 64, 64], single),
        ("Softmax", ["batch", 2, 64, 64], half),
    )
    assert largest_tensor(model, {"height": 8, "width": 8}) == 2 * 64 * 64 * 4
    assert largest_tensor(model, {"height": 80, "width": 80}) == 8 * 80 * 80 * 2


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        ([None, 2, 64, None], 2 * 64 * 64),  # as full-size graphs say it: keys went through a computed shape
        (["batch", 2, 64, 24], 2 * 64 * 24),
        (["batch", 2, None, None], 2 * 32 * 32),  # open picture sizes: every latent position counts as a token
        (["batch", 2, None, 24], 2 * 32 * 24),
    ],
)
def test_scores_of_an_attention_count_where_their_sizes_are_open(shape: list[int | str | None], count: int) -> None:
    half = ir.DataType.FLOAT16
    model = graph(("Conv", ["batch", 5120, None, None], half), ("Softmax", shape, half))
    assert largest_tensor(model, {"height": 8, "width": 4}) == 2 * count


@pytest.mark.slow
@pytest.mark.parametrize(("name", "model"), [("sd14", "SD v1-4"), ("sdxl", "SDXL")])
def test_the_scores_of_full_size_graphs_are_found(name: str, model: str) -> None:
    """Traced as an export does it, on the meta device."""
    original = ORIGINALS[name]
    with torch.device("meta"):
        network = original.denoiser(**original.config)
    timesteps = TimestepTable("none", {}, 1, (0.0,), np.zeros(1))
    slices = TimePath(network).slices
    table = TimeTable(np.zeros((1, max(stop for _, stop in slices.values())), np.float32), slices)
    time = timesteps if name == "sdxl" else table  # whose features depend on the prompt too
    traced = trace_denoiser(network_config(network), time, TransformSpec(), tokens=77, dtype=torch.float16)
    FoldConstants()(traced.model)
    side = original.config["sample_size"]
    positions, scores = SIZES[model]
    assert positions == side * side
    assert largest_tensor(traced.model, {"height": side, "width": side}) == scores


def test_a_cpu_takes_any_batch(graph_of: GraphOf) -> None:
    found = default_profile_of(graph_of("fp32", "int8"), "onnxruntime", BuildOptions(), "auto")
    assert found.profile == ShapeProfile(1, 2, 32)


def test_ahead_of_time_a_gpu_with_8_gb_is_assumed(graph_of: GraphOf, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    small = graph_of("fp16", "int8")
    if backend_by_name("tensorrt_rtx").environment()["device"] != "no GPU":
        pytest.skip("needs a machine without a GPU")
    found = default_profile_of(small, "tensorrt_rtx", BuildOptions(), "auto")
    assert str(found).startswith("batches of 1:2:32, for a GPU with 8 GB, as there is none here: weights ")
    resolved = check_build(small, "tensorrt_rtx", tmp_path / "out", BuildOptions(), Limits(), replace=False)
    assert resolved.profile == found.profile
    asked = BuildOptions(profile=ShapeProfile(1, 3, 5))
    resolved = check_build(small, "tensorrt_rtx", tmp_path / "out", asked, Limits(), replace=False)
    assert resolved.profile == ShapeProfile(1, 3, 5)


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_the_memory_is_that_of_the_gpu_that_was_asked_for(
    graph_of: GraphOf, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    pytest.importorskip("tensorrt_rtx")
    stand_in_gpus(monkeypatch)
    found = default_profile_of(graph_of("fp16", "int8"), "tensorrt_rtx", BuildOptions(), device)
    assert f"for the {FREE[int(device[-1])] / 1e9:.3g} GB free here" in str(found)
