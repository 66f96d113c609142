from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from s2p_deploy.calib.quantized_denoiser import FakeQuantDenoiser
from s2p_deploy.engines import PreparedParts, TorchRunner, engine_parts
from s2p_deploy.families import Tap, load_pipeline
from s2p_deploy.records import ExportedGraph, ScaleTable
from s2p_deploy.validation import Chain
from s2p_deploy.validation.agreement import REFERENCE, block_agreement, block_errors, code_agreement, site_agreement
from s2p_deploy.validation.end_to_end import measure_end_to_end
from s2p_deploy.validation.latents import ValidationLatents
from s2p_deploy.validation.metrics import SQNR_CEILING
from s2p_deploy.validation.reference import forced_outputs, reference_calls, unquantized_denoiser

BLOCK = "mid_block.resnets.0"


def graph_with_doubled_scale(graph: ExportedGraph, point: str) -> ExportedGraph:
    scales = graph.scales.scales.copy()
    scales[:, graph.scales.points.index(point)] *= 2
    return replace(graph, scales=ScaleTable(scales, graph.scales.points, graph.scales.trained))


def by_block(fake_quant: FakeQuantDenoiser, graph: ExportedGraph, latents: ValidationLatents) -> dict[str, float]:
    found = block_agreement(fake_quant, graph, latents, PreparedParts(graph, *REFERENCE))
    return {block.block: block.sqnr for block in found}


def test_codes_of_a_right_export_agree(chain: Chain, fake_quant: FakeQuantDenoiser, latents: ValidationLatents) -> None:
    found = code_agreement(fake_quant, chain.graph, latents)
    assert [point.point for point in found] == [point.name for point in chain.graph.plan.act_points]
    assert max(point.mismatch for point in found) <= 0.001
    assert max(point.max_lsb for point in found) <= 1
    conv = next(point for point in found if point.point == "down_blocks.0.resnets.0.conv1")
    assert conv.n == len(latents) * 8 * 8 * 8  # channels, height, width


def test_codes_show_one_wrong_scale_and_where(
    chain: Chain, fake_quant: FakeQuantDenoiser, latents: ValidationLatents
) -> None:
    point = f"{BLOCK}.conv1"
    found = code_agreement(fake_quant, graph_with_doubled_scale(chain.graph, point), latents)
    wrong = [item.point for item in found if item.mismatch > 0.001]
    assert wrong == [point]


def test_blocks_of_a_right_export_agree(
    chain: Chain, fake_quant: FakeQuantDenoiser, latents: ValidationLatents
) -> None:
    found = block_agreement(fake_quant, chain.graph, latents, PreparedParts(chain.graph, *REFERENCE))
    assert [block.block for block in found] == [block.block for block in chain.graph.blocks]
    assert min(block.sqnr for block in found) >= 50.0
    assert {block.n for block in found} == {len(latents)}


def test_blocks_show_one_wrong_scale_and_where(
    chain: Chain, fake_quant: FakeQuantDenoiser, latents: ValidationLatents
) -> None:
    wrong = graph_with_doubled_scale(chain.graph, f"{BLOCK}.conv2")
    found = by_block(fake_quant, wrong, latents)
    assert [block for block, sqnr in found.items() if sqnr < 50.0] == [BLOCK]


def test_blocks_show_a_scale_that_is_wrong_on_one_row_only(
    chain: Chain, fake_quant: FakeQuantDenoiser, latents: ValidationLatents
) -> None:
    scales = chain.graph.scales.scales.copy()
    scales[latents.rows[-1], chain.graph.scales.points.index(f"{BLOCK}.conv2")] *= 2
    wrong = replace(chain.graph, scales=ScaleTable(scales, chain.graph.scales.points, chain.graph.scales.trained))
    found = by_block(fake_quant, wrong, latents)
    assert found[BLOCK] < 50.0


def test_blocks_show_a_changed_weight(chain: Chain, fake_quant: FakeQuantDenoiser, latents: ValidationLatents) -> None:
    with torch.no_grad():
        fake_quant.site(f"{BLOCK}.conv1").weight.mul_(1.05)
    found = by_block(fake_quant, chain.graph, latents)
    assert found[BLOCK] < 50.0
    assert found["mid_block.resnets.1"] >= 50.0  # fed the reference's own input: errors do not pile up


def test_sites_of_an_engine_agree_and_quantization_costs_them_something(
    chain: Chain, fake_quant: FakeQuantDenoiser, latents: ValidationLatents
) -> None:
    twin, scales = unquantized_denoiser(chain.calibrated), chain.engine.scales.scales
    with engine_parts(chain.engine, chain.graph) as parts:
        assert parts is not None
        found = site_agreement(fake_quant, twin, chain.graph, latents.spread(4), parts, scales=scales)
        doubled = scales.copy()
        doubled[:, chain.graph.scales.points.index(f"{BLOCK}.conv1")] *= 2
        wrong = site_agreement(fake_quant, twin, chain.graph, latents.spread(4), parts, scales=doubled)
    assert [site.site for site in found] == [site.site for site in chain.graph.sites]
    assert min(site.sqnr for site in found) > 80
    assert all(site.quantization is not None and 20 < site.quantization < 80 for site in found)
    assert {site.n for site in found} == {4}
    assert [site.site for site in wrong if site.sqnr < 60] == [f"{BLOCK}.conv1"]
    assert not any(module._forward_hooks for module in fake_quant.modules())


def test_what_quantization_costs_a_block_is_its_own(
    chain: Chain, fake_quant: FakeQuantDenoiser, latents: ValidationLatents
) -> None:
    twin = unquantized_denoiser(chain.calibrated)
    before = {error.block: error.quantization for error in block_errors(fake_quant, twin, chain.graph, latents)}
    assert all(cost is not None and 15 < cost < 80 for cost in before.values())
    with torch.no_grad():
        fake_quant.site(f"{BLOCK}.conv1").weight.mul_(1.2)
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
    site = "conv_in"
    entering, leaving = Tap(site, "input"), Tap(site, "output")
    calls = list(reference_calls(fake_quant, latents, (entering, leaving, entering)))
    entered = np.concatenate([call.seen[entering] for call in calls])
    np.testing.assert_array_equal(entered, latents.sample)
    assert calls[0].seen[leaving].shape == (len(latents), 8, 8, 8)
    assert all(set(call.seen) == {entering, leaving} for call in calls)
    assert not fake_quant.site(site)._forward_hooks
    assert not fake_quant.site(site)._forward_pre_hooks


def floating(chain: Chain) -> Callable[..., torch.Tensor]:
    """The pipeline's own UNet: its rows are timesteps."""
    unet = load_pipeline(chain.base).unet
    return lambda sample, rows, text: unet(sample, rows, text, return_dict=False)[0]


def test_fake_quant_against_itself_changes_nothing_end_to_end(
    chain: Chain, fake_quant: FakeQuantDenoiser, latents: ValidationLatents
) -> None:
    found = measure_end_to_end(floating(chain), fake_quant, TorchRunner(fake_quant), latents)
    assert np.all(found.change == 0)
    assert np.all(found.engine_to_fake_quant == SQNR_CEILING)
    assert found.rows.tolist() == latents.rows.tolist()
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
