from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from s2p_deploy.calib.quantized_denoiser import FakeQuantDenoiser
from s2p_deploy.engines import PreparedSubgraphs, TorchRunner, engine_subgraphs
from s2p_deploy.families import Tap, load_pipeline
from s2p_deploy.metrics import SQNR_CEILING
from s2p_deploy.records import ExportedGraph, ScaleTable
from s2p_deploy.validation import Chain
from s2p_deploy.validation.end_to_end import WholeDenoiser, measure_end_to_end, whole_denoiser
from s2p_deploy.validation.parity import (
    REFERENCE,
    block_agreement,
    block_errors,
    code_agreement,
    constant_time_gap,
    layer_agreement,
    scale_gap,
)
from s2p_deploy.validation.reference import ValidationLatents, forced_outputs, reference_calls, unquantized_denoiser

BLOCK = "mid_block.resnets.0"


def graph_with_doubled_scale(graph: ExportedGraph, quantizer: str) -> ExportedGraph:
    scales = graph.scales.scales.copy()
    scales[:, graph.scales.quantizers.index(quantizer)] *= 2
    return replace(graph, scales=ScaleTable(scales, graph.scales.quantizers, graph.scales.calibrated))


def by_block(fake_quant: FakeQuantDenoiser, graph: ExportedGraph, latents: ValidationLatents) -> dict[str, float]:
    found = block_agreement(fake_quant, graph, latents, PreparedSubgraphs(graph, *REFERENCE))
    return {block.block: block.sqnr for block in found}


def test_codes_of_a_right_export_agree(chain: Chain, fake_quant: FakeQuantDenoiser, latents: ValidationLatents) -> None:
    found = code_agreement(fake_quant, chain.graph, latents)
    assert [quantizer.quantizer for quantizer in found] == [
        quantizer.name for quantizer in chain.graph.plan.activation_quantizers
    ]
    assert max(quantizer.mismatch for quantizer in found) <= 0.001
    assert max(quantizer.max_lsb for quantizer in found) <= 1
    conv = next(quantizer for quantizer in found if quantizer.quantizer == "down_blocks.0.resnets.0.conv1")
    assert conv.n == len(latents) * 8 * 8 * 8  # channels, height, width


def test_codes_show_one_wrong_scale_and_where(
    chain: Chain, fake_quant: FakeQuantDenoiser, latents: ValidationLatents
) -> None:
    quantizer = f"{BLOCK}.conv1"
    found = code_agreement(fake_quant, graph_with_doubled_scale(chain.graph, quantizer), latents)
    wrong = [item.quantizer for item in found if item.mismatch > 0.001]
    assert wrong == [quantizer]


def test_blocks_of_a_right_export_agree(
    chain: Chain, fake_quant: FakeQuantDenoiser, latents: ValidationLatents
) -> None:
    found = block_agreement(fake_quant, chain.graph, latents, PreparedSubgraphs(chain.graph, *REFERENCE))
    assert [block.block for block in found] == [block.block for block in chain.graph.blocks]
    assert min(block.sqnr for block in found) >= 50.0
    assert {block.n for block in found} == {len(latents)}


def test_blocks_show_one_wrong_scale_and_where(
    chain: Chain, fake_quant: FakeQuantDenoiser, latents: ValidationLatents
) -> None:
    wrong = graph_with_doubled_scale(chain.graph, f"{BLOCK}.conv2")
    found = by_block(fake_quant, wrong, latents)
    assert [block for block, sqnr in found.items() if sqnr < 50.0] == [BLOCK]


def test_blocks_show_a_scale_that_is_wrong_at_one_timestep_only(
    chain: Chain, fake_quant: FakeQuantDenoiser, latents: ValidationLatents
) -> None:
    scales = chain.graph.scales.scales.copy()
    scales[latents.timestep_indices[-1], chain.graph.scales.quantizers.index(f"{BLOCK}.conv2")] *= 2
    wrong = replace(
        chain.graph, scales=ScaleTable(scales, chain.graph.scales.quantizers, chain.graph.scales.calibrated)
    )
    found = by_block(fake_quant, wrong, latents)
    assert found[BLOCK] < 50.0


def test_blocks_show_a_changed_weight(chain: Chain, fake_quant: FakeQuantDenoiser, latents: ValidationLatents) -> None:
    with torch.no_grad():
        fake_quant.layer(f"{BLOCK}.conv1").weight.mul_(1.05)
    found = by_block(fake_quant, chain.graph, latents)
    assert found[BLOCK] < 50.0
    assert found["mid_block.resnets.1"] >= 50.0  # fed the reference's own input: errors do not pile up


def test_layers_of_an_engine_agree_and_quantization_costs_them_something(
    chain: Chain, fake_quant: FakeQuantDenoiser, latents: ValidationLatents
) -> None:
    twin, scales = unquantized_denoiser(chain.calibrated), chain.engine.scales.scales
    with engine_subgraphs(chain.engine, chain.graph) as parts:
        assert parts is not None
        found = layer_agreement(fake_quant, twin, chain.graph, latents.spread(4), parts, scales=scales)
        doubled = scales.copy()
        doubled[:, chain.graph.scales.quantizers.index(f"{BLOCK}.conv1")] *= 2
        wrong = layer_agreement(fake_quant, twin, chain.graph, latents.spread(4), parts, scales=doubled)
    assert [layer.name for layer in found] == [layer.name for layer in chain.graph.layers]
    assert min(layer.sqnr for layer in found) > 80
    assert all(layer.quantization is not None and 20 < layer.quantization < 80 for layer in found)
    assert {layer.n for layer in found} == {4}
    assert [layer.name for layer in wrong if layer.sqnr < 60] == [f"{BLOCK}.conv1"]
    assert not any(module._forward_hooks for module in fake_quant.modules())


def test_what_quantization_costs_a_block_is_its_own(
    chain: Chain, fake_quant: FakeQuantDenoiser, latents: ValidationLatents
) -> None:
    twin = unquantized_denoiser(chain.calibrated)
    before = {error.block: error.quantization for error in block_errors(fake_quant, twin, chain.graph, latents)}
    assert all(cost is not None and 15 < cost < 80 for cost in before.values())
    with torch.no_grad():
        fake_quant.layer(f"{BLOCK}.conv1").weight.mul_(1.2)
    after = {error.block: error.quantization for error in block_errors(fake_quant, twin, chain.graph, latents)}
    assert after[BLOCK] < before[BLOCK] - 3
    others = [block for block in before if block != BLOCK]
    assert max(abs(after[block] - before[block]) for block in others) < 3  # other activations, the same blocks


def test_a_forced_denoiser_is_given_the_activation_wherever_it_is_read(
    fake_quant: FakeQuantDenoiser, chain: Chain, latents: ValidationLatents
) -> None:
    entering, leaving = Tap(BLOCK, "input"), Tap(BLOCK, "output")
    (call,) = reference_calls(fake_quant, latents, (entering, leaving))
    twin, given = unquantized_denoiser(chain.calibrated), call.seen[entering]
    plain = forced_outputs(twin, call, (entering,), (leaving,))[leaving]
    call.seen[entering] = 2 * given
    doubled = forced_outputs(twin, call, (entering,), (leaving,))[leaving]
    # the norm inside takes the factor back, the residual sum beside it keeps it
    np.testing.assert_allclose(doubled - plain, given, atol=0.02 * np.abs(given).max())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in twin.modules())


def test_the_reference_gives_what_enters_and_leaves_and_leaves_no_hook(
    fake_quant: FakeQuantDenoiser, latents: ValidationLatents
) -> None:
    layer = "conv_in"
    entering, leaving = Tap(layer, "input"), Tap(layer, "output")
    calls = list(reference_calls(fake_quant, latents, (entering, leaving, entering)))
    entered = np.concatenate([call.seen[entering] for call in calls])
    np.testing.assert_array_equal(entered, latents.sample)
    assert calls[0].seen[leaving].shape == (len(latents), 8, 8, 8)
    assert all(set(call.seen) == {entering, leaving} for call in calls)
    assert not fake_quant.layer(layer)._forward_hooks
    assert not fake_quant.layer(layer)._forward_pre_hooks


def floating(chain: Chain) -> WholeDenoiser:
    return whole_denoiser(load_pipeline(chain.base), chain.calibrated.timesteps)


def test_fake_quant_against_itself_changes_nothing_end_to_end(
    chain: Chain, fake_quant: FakeQuantDenoiser, latents: ValidationLatents
) -> None:
    found = measure_end_to_end(floating(chain), fake_quant, TorchRunner(fake_quant), latents)
    assert np.all(found.change == 0)
    assert np.all(found.engine_to_fake_quant == SQNR_CEILING)
    assert found.timestep_indices.tolist() == latents.timestep_indices.tolist()
    assert 5 < found.fake_quant.mean() < 60  # 8 bits: neither equal to FP nor unrelated
    assert found.floor.mean() > found.fake_quant.mean()


def test_end_to_end_shows_an_engine_that_is_further_from_fp(
    chain: Chain, fake_quant: FakeQuantDenoiser, latents: ValidationLatents
) -> None:
    rng = np.random.default_rng(0)

    class NoisyRunner(TorchRunner):
        def infer(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            output = super().infer(inputs)["noise_pred"]
            return {"noise_pred": output + 0.1 * output.std() * rng.standard_normal(output.shape)}

    found = measure_end_to_end(floating(chain), fake_quant, NoisyRunner(fake_quant), latents)
    assert found.change.mean() < -3.0
    assert found.engine.mean() == pytest.approx(20.0, abs=1.5)  # a tenth


def changed(table: ScaleTable, row: int, column: int, factor: float) -> ScaleTable:
    scales = table.scales.copy()
    scales[row, column] *= factor
    return replace(table, scales=scales)


@pytest.mark.parametrize("factor", [1.01, 0.5])
def test_the_largest_difference_of_scales_is_placed(chain: Chain, factor: float) -> None:
    table = chain.calibrated.scales
    gap = scale_gap("scale table", changed(table, 7, 3, factor), table)
    assert gap.difference == pytest.approx(abs(factor - 1), rel=1e-4)
    assert gap.where == f"{table.quantizers[3]}, timestep index 7"
    assert gap.n == table.scales.size


def test_equal_scales_have_no_difference_and_other_ones_no_number(chain: Chain) -> None:
    table = chain.calibrated.scales
    assert scale_gap("scale table", table, table).difference == 0.0
    renamed = replace(table, quantizers=tuple(f"other {name}" for name in table.quantizers))
    assert np.isnan(scale_gap("scale table", renamed, table).difference)
    assert np.isnan(scale_gap("scale table", replace(table, scales=table.scales[:-1]), table).difference)
    none = ScaleTable(np.zeros((1000, 0), np.float32), (), ())
    assert scale_gap("scale table", none, none).n == 0


def test_the_time_table_of_a_graph_is_the_models(chain: Chain) -> None:
    gap = constant_time_gap("time table", PreparedSubgraphs(chain.graph, *REFERENCE), chain.calibrated, half=False)
    assert gap is not None
    assert (gap.difference, gap.n) == (0.0, 1000)
