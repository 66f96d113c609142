from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from s2p_deploy.calib import QuantizedConv2d, QuantizedDenoiser, QuantizedLinear, plan_from_recipe
from s2p_deploy.calib.quantization.scale_start import starting_weight_scales
from s2p_deploy.calib.quantized_denoiser import FakeQuantDenoiser, SampleGrids
from s2p_deploy.errors import InputError, S2PError
from s2p_deploy.families import HotDenoiser, discover_sites
from s2p_deploy.numerics import INT4, INT8, fake_quantize
from s2p_deploy.recipe import Recipe, Rule, load_recipe
from s2p_deploy.records import PrecisionPlan

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]

ROWS = 1000
TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture
def plan(hot: HotDenoiser, recipe: Recipe) -> PrecisionPlan:
    return plan_from_recipe(recipe, discover_sites(hot))


@pytest.fixture
def quantized(hot: HotDenoiser, plan: PrecisionPlan) -> QuantizedDenoiser:
    """In double precision: no rounding flips when a batch is cut another way."""
    scales = starting_weight_scales(hot, plan)
    return QuantizedDenoiser(copy.deepcopy(hot), plan, scales).double().requires_grad_(requires_grad=False)


@pytest.fixture
def act_scales(plan: PrecisionPlan) -> Tensor:
    """Far apart from row to row, so that a wrong row is seen."""
    generator = torch.Generator().manual_seed(3)
    return 0.01 * (1 + 9 * torch.rand(ROWS, len(plan.act_points), generator=generator, dtype=torch.float64))


@pytest.fixture
def inputs() -> Inputs:
    generator = torch.Generator().manual_seed(4)
    sample = torch.randn(3, 4, 8, 8, generator=generator, dtype=torch.float64)
    texts = torch.randn(3, 5, 128, generator=generator, dtype=torch.float64)
    return sample, torch.tensor([1, 500, 999]), texts, sample.new_zeros(3, 0)


def test_samples_of_one_batch_sit_on_their_own_rows(
    quantized: QuantizedDenoiser, act_scales: Tensor, inputs: Inputs
) -> None:
    together = quantized(*inputs, SampleGrids(act_scales[inputs[1]]))
    for index in range(3):
        alone = quantized(
            *(value[index : index + 1] for value in inputs), SampleGrids(act_scales[inputs[1][index : index + 1]])
        )
        torch.testing.assert_close(together[index], alone[0])
    rows = torch.tensor([1, 500, 500])
    other = quantized(inputs[0], rows, *inputs[2:], SampleGrids(act_scales[rows]))
    assert torch.equal(together[:2], other[:2])
    assert not torch.allclose(together[2], other[2], rtol=1e-2)


def test_a_sites_arithmetic_is_the_numerics(
    hot: HotDenoiser, quantized: QuantizedDenoiser, act_scales: Tensor, inputs: Inputs
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    site = quantized.site(TO_Q)
    site.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    quantized(*inputs, SampleGrids(act_scales[inputs[1]]))
    ((x, output),) = seen
    column = quantized.plan.point_names().index(TO_Q)
    scale = act_scales[inputs[1], column].view(3, 1, 1)
    weight = hot.network.get_submodule(TO_Q).weight
    grid = fake_quantize(weight.double(), quantized.weight_scales()[TO_Q], INT4)
    torch.testing.assert_close(output, fake_quantize(x, scale, INT8) @ grid.T)
    codes = site.input_quantizer.codes(x, scale.flatten())
    torch.testing.assert_close(codes * scale, fake_quantize(x, scale, INT8))


def test_sites_of_one_tensor_use_one_column(quantized: QuantizedDenoiser, act_scales: Tensor, inputs: Inputs) -> None:
    reference = FakeQuantDenoiser(quantized, act_scales)
    names = [TO_Q, TO_Q.replace("to_q", "to_k"), TO_Q.replace("to_q", "to_v")]
    found = [reference.site_scale(name, inputs[1]) for name in names]
    assert all(torch.equal(scale, found[0]) for scale in found)
    assert reference.site_scale("conv_in", inputs[1]) is None


def test_a_site_without_a_scale_raises_before_and_after_a_call(
    quantized: QuantizedDenoiser, act_scales: Tensor, inputs: Inputs
) -> None:
    x = torch.zeros(3, 64, 8, dtype=torch.float64)
    for _ in range(2):
        with pytest.raises(S2PError, match=f"site {TO_Q} was reached without an activation scale"):
            quantized.site(TO_Q)(x)
        quantized(*inputs, SampleGrids(act_scales[inputs[1]]))


def test_recipe_fp_changes_no_bit(hot: HotDenoiser, inputs: Inputs) -> None:
    hot.double()
    expected = hot(*inputs)
    plan = plan_from_recipe(load_recipe("fp"), discover_sites(hot))
    assert torch.equal(QuantizedDenoiser(hot, plan, {})(*inputs, SampleGrids(torch.ones(len(inputs[0]), 0))), expected)


def test_baked_weights_give_the_same_output(
    hot: HotDenoiser,
    plan: PrecisionPlan,
    quantized: QuantizedDenoiser,
    act_scales: Tensor,
    inputs: Inputs,
) -> None:
    scales = quantized.weight_scales()
    baked = QuantizedDenoiser(hot.double(), plan, scales, bake=True)
    grids = SampleGrids(act_scales[inputs[1]])
    torch.testing.assert_close(baked(*inputs, grids), quantized(*inputs, grids))
    assert baked.weight_scales() == {}


def test_a4_is_the_four_bit_grid(hot: HotDenoiser, recipe: Recipe, inputs: Inputs) -> None:
    rules = (*recipe.rules, Rule(match=TO_Q, activations="int4"))
    plan = plan_from_recipe(recipe.model_copy(update={"rules": rules}), discover_sites(hot))
    denoiser = QuantizedDenoiser(hot, plan, starting_weight_scales(hot, plan))
    codes = denoiser.site(TO_Q).input_quantizer.codes(torch.linspace(-9, 9, 64).view(1, 8, 8), torch.ones(1))
    assert (codes.min(), codes.max()) == (-8, 7)


def test_names_and_kinds_stay_the_hot_denoisers(hot: HotDenoiser, plan: PrecisionPlan) -> None:
    before = {name: tuple(value.shape) for name, value in hot.state_dict().items()}
    sites = discover_sites(hot)
    denoiser = QuantizedDenoiser(hot, plan, starting_weight_scales(hot, plan))
    assert {name: tuple(value.shape) for name, value in denoiser.hot_state().items()} == before
    assert {type(denoiser.site(site.name)) for site in sites} == {QuantizedConv2d, QuantizedLinear}


def test_a_plan_of_another_denoiser_is_refused(hot: HotDenoiser, plan: PrecisionPlan) -> None:
    with pytest.raises(InputError, match="site conv_in has int8 weights in the plan and no weight scale"):
        QuantizedDenoiser(hot, plan, {})
