"""A calibrated model whose modules were rewritten: split shortcuts, smoothing and shifts at once."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import torch
from artifacts import tiny_calibrated, tiny_inputs, tiny_unet

from s2p_deploy.calib.modelopt import set_smoothing
from s2p_deploy.calib.quantized_denoiser import fake_quant_denoiser
from s2p_deploy.errors import InputError
from s2p_deploy.export import Subgraphs, export_graph
from s2p_deploy.families import (
    ShiftedLayer,
    TimePath,
    apply_transforms,
    discover_layers,
    layers_behind_norms,
    module_of_type,
    set_norm_shift,
)
from s2p_deploy.records import TransformSpec

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from s2p_deploy.families import IndexedDenoiser
    from s2p_deploy.records import CalibratedModel, ExportedGraph


def rewrite(float_denoiser: IndexedDenoiser) -> TransformSpec:
    """Every kind of rewrite, with values that are far from a fresh one's; linear layers in the middle block only."""
    linears = [
        layer
        for layer in discover_layers(float_denoiser)
        if layer.op == "linear" and layer.name.startswith("mid_block")
    ]
    smoothed = tuple(layer.name for layer in linears if ".ff." not in layer.name)
    splits = float_denoiser.family.split_shortcuts(float_denoiser.network)
    convolutions = [layer.name for layer in discover_layers(float_denoiser) if layer.op == "conv"][1:-1]
    halves = (f"{path}.{half}" for path in splits for half in ("head", "skip"))
    shifted = (*(name for name in convolutions if name not in splits), *halves, "mid_block.attentions.0.proj_in")
    norms = {
        norm: readers
        for norm, readers in layers_behind_norms(float_denoiser).items()
        if not norm.startswith("mid_block") and not set(readers) & set(shifted)
    }
    assert any(reader.endswith("attn1.to_q") for readers in norms.values() for reader in readers)
    spec = TransformSpec(
        splits, tuple(path for path in smoothed if path not in shifted), tuple(dict.fromkeys(shifted)), norms
    )
    apply_transforms(float_denoiser, spec)
    generator = torch.Generator().manual_seed(0)
    for norm, readers in norms.items():
        shift = float_denoiser.network.get_submodule(norm).shift
        set_norm_shift(float_denoiser, norm, readers, torch.rand(shift.shape, generator=generator) - 0.5)
    for path in spec.shifted:
        module = module_of_type(float_denoiser, path, ShiftedLayer)
        module.set_shift(torch.rand(module.shift.shape, generator=generator) - 0.5)
    for path in spec.smoothed:
        factor = float_denoiser.network.get_submodule(path).factor
        set_smoothing(float_denoiser, {path: torch.rand(factor.shape, generator=generator) + 0.5})
    return spec


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> CalibratedModel:
    return tiny_calibrated(tmp_path_factory.mktemp("transforms") / "calib", "int4", "int8", rewrite=rewrite)


@pytest.fixture(scope="module")
def graph(calibrated: CalibratedModel) -> ExportedGraph:
    return export_graph(calibrated, calibrated.folder.parent / "graph")


def sqnr(candidate: np.ndarray, reference: np.ndarray) -> float:
    error = np.square(candidate.astype(np.float64) - reference).sum()
    return float(10 * np.log10(np.square(reference.astype(np.float64)).sum() / max(error, 1e-300)))


def captured(calibrated: CalibratedModel, paths: list[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Input and output of the fake-quant reference's modules."""
    reference, seen = fake_quant_denoiser(calibrated), {}
    for path in paths:

        def note(_module: torch.nn.Module, args: tuple, output: object, path: str = path) -> None:
            first = output if isinstance(output, torch.Tensor) else output[0]
            seen[path] = (args[0].numpy(), first.numpy())

        reference.layer(path).register_forward_hook(note)
    reference(**{name: torch.from_numpy(value) for name, value in tiny_inputs(3).items()})
    return seen


@pytest.mark.slow
def test_the_graph_draws_what_the_reference_draws(tmp_path: Path, run_onnx: Callable) -> None:
    """Of a model with plain activations: one code that falls on the other side of a tie is amplified by many layers."""
    calibrated = tiny_calibrated(tmp_path / "calib", "int4", "none", rewrite=rewrite)
    graph, inputs = export_graph(calibrated, tmp_path / "graph"), tiny_inputs(3)
    expected = fake_quant_denoiser(calibrated)(**{k: torch.from_numpy(v) for k, v in inputs.items()}).numpy()
    assert sqnr(run_onnx(graph.onnx_file, inputs)["noise_pred"], expected) > 100


def test_every_block_agrees_when_it_is_fed_the_reference(
    calibrated: CalibratedModel, graph: ExportedGraph, run_onnx: Callable
) -> None:
    blocks = [block for block in graph.blocks if block.block != "output"]
    seen, parts = captured(calibrated, [block.block for block in blocks]), Subgraphs(graph)
    inputs = tiny_inputs(3) | {"act_scales": graph.scales.scales}
    found = {
        block.block: sqnr(
            run_onnx(parts.block(block.block), inputs | {block.entering[0].tensor: seen[block.block][0]})[
                block.leaving[0].tensor
            ],
            seen[block.block][1],
        )
        for block in blocks
    }
    assert min(found.values()) >= 50, found
    assert np.median(list(found.values())) >= 100, found


def test_inner_modules_are_layers_of_the_graph(graph: ExportedGraph) -> None:
    layers = {layer.name: layer for layer in graph.layers}
    head, skip = (layers[f"up_blocks.0.resnets.0.conv1.{half}.layer"] for half in ("head", "skip"))
    assert head.codes != skip.codes, "each half has a grid of its own"
    assert (head.weights, skip.activations) == ("int4", "int8")
    query = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.layer"
    assert layers[query].codes is not None
    made_by = {value: node for node in onnx.load(graph.onnx_file).graph.node for value in node.output}
    quantizer = f"{head.activation_quantizer}/input_quantizer"
    scaled = made_by[f"{quantizer}/scaled"]
    subtraction = made_by[scaled.input[0]]
    assert subtraction.op_type == "Sub"
    assert made_by[subtraction.input[0]].op_type == "Pad"
    stored = {item.name: item for item in onnx.load(graph.onnx_file).graph.initializer}
    assert list(stored["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.factor"].dims) == [64]


@pytest.mark.slow
def test_a_half_graph_is_exported_too(calibrated: CalibratedModel, run_onnx: Callable) -> None:
    options = {"time_table": "input", "time_path": TimePath(tiny_unet())}
    graph = export_graph(calibrated, calibrated.folder.parent / "half", dtype="fp16", **options)
    block = next(block for block in graph.blocks if block.block == "up_blocks.1.resnets.0")
    source, expected = captured(calibrated, [block.block])[block.block]
    values = {k: v.astype(np.float16) if v.dtype == np.float32 else v for k, v in tiny_inputs(3).items()}
    steps = values["timestep_index"]
    values |= {
        block.entering[0].tensor: source.astype(np.float16),
        "act_scales": graph.scales.scales,
        "time_projections": calibrated.time_table().projections[steps].astype(np.float16),
    }
    assert sqnr(run_onnx(Subgraphs(graph).block(block.block), values)[block.leaving[0].tensor], expected) > 30


def test_a_model_that_no_engine_can_run_is_refused(calibrated: CalibratedModel) -> None:
    compared = replace(calibrated, research="10-bit activations")
    out = calibrated.folder.parent / "refused"
    with pytest.raises(InputError, match="made for comparison only: no engine has 10-bit activations"):
        export_graph(compared, out)
    assert not out.exists()
    with pytest.raises(InputError, match="no engine has 10-bit activations"):
        fake_quant_denoiser(compared)
