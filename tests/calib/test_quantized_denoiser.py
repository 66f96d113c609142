from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from s2p_deploy.calib import QuantizedConv2d, QuantizedDenoiser, QuantizedLinear, plan_from_recipe
from s2p_deploy.calib.quantized_denoiser import FakeQuantDenoiser, InputQuantizer, WeightQuantizer
from s2p_deploy.calib.starting_scales import starting_weight_scales
from s2p_deploy.errors import InputError, S2PError
from s2p_deploy.families import IndexedDenoiser, ShiftedLayer, discover_layers
from s2p_deploy.numerics import INT4, INT8, fake_quantize
from s2p_deploy.recipe import Recipe, Rule, Scales
from s2p_deploy.records import PrecisionPlan

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]

ROWS = 1000
TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture
def plan(float_denoiser: IndexedDenoiser, recipe: Recipe) -> PrecisionPlan:
    return plan_from_recipe(recipe, discover_layers(float_denoiser))


@pytest.fixture
def quantized(float_denoiser: IndexedDenoiser, plan: PrecisionPlan) -> QuantizedDenoiser:
    """In double precision: no rounding flips when a batch is cut another way."""
    scales = starting_weight_scales(float_denoiser, plan, Scales())
    return QuantizedDenoiser(copy.deepcopy(float_denoiser), plan, scales).double().requires_grad_(requires_grad=False)


@pytest.fixture
def act_scales(plan: PrecisionPlan) -> Tensor:
    """Far apart from row to row, so that a wrong row is seen."""
    generator = torch.Generator().manual_seed(3)
    return 0.01 * (1 + 9 * torch.rand(ROWS, len(plan.activation_quantizers), generator=generator, dtype=torch.float64))


@pytest.fixture
def inputs() -> Inputs:
    generator = torch.Generator().manual_seed(4)
    sample = torch.randn(3, 4, 8, 8, generator=generator, dtype=torch.float64)
    texts = torch.randn(3, 5, 128, generator=generator, dtype=torch.float64)
    return sample, torch.tensor([1, 500, 999]), texts, sample.new_zeros(3, 0)


def test_samples_of_one_batch_sit_on_their_own_rows(
    quantized: QuantizedDenoiser, act_scales: Tensor, inputs: Inputs
) -> None:
    together = quantized(*inputs, act_scales[inputs[1]])
    for index in range(3):
        alone = quantized(*(value[index : index + 1] for value in inputs), act_scales[inputs[1][index : index + 1]])
        torch.testing.assert_close(together[index], alone[0])
    rows = torch.tensor([1, 500, 500])
    other = quantized(inputs[0], rows, *inputs[2:], act_scales[rows])
    assert torch.equal(together[:2], other[:2])
    assert not torch.allclose(together[2], other[2], rtol=1e-2)


def test_a_layers_arithmetic_is_the_numerics(
    float_denoiser: IndexedDenoiser, quantized: QuantizedDenoiser, act_scales: Tensor, inputs: Inputs
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    layer = quantized.layer(TO_Q)
    layer.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    quantized(*inputs, act_scales[inputs[1]])
    ((x, output),) = seen
    column = quantized.plan.quantizer_names().index(TO_Q)
    scale = act_scales[inputs[1], column].view(3, 1, 1)
    weight = float_denoiser.network.get_submodule(TO_Q).weight
    grid = fake_quantize(weight.double(), quantized.weight_scales()[TO_Q], INT4)
    torch.testing.assert_close(output, fake_quantize(x, scale, INT8) @ grid.T)
    codes = layer.input_quantizer.codes(x, scale.flatten())
    torch.testing.assert_close(codes * scale, fake_quantize(x, scale, INT8))


def test_layers_of_one_tensor_use_one_column(quantized: QuantizedDenoiser, act_scales: Tensor, inputs: Inputs) -> None:
    reference = FakeQuantDenoiser(quantized, act_scales)
    names = [TO_Q, TO_Q.replace("to_q", "to_k"), TO_Q.replace("to_q", "to_v")]
    found = [reference.layer_scale(name, inputs[1]) for name in names]
    assert all(torch.equal(scale, found[0]) for scale in found)
    assert reference.layer_scale("conv_in", inputs[1]) is None


def test_q_k_and_v_of_one_tensor_are_quantized_once_and_nothing_is_kept(
    quantized: QuantizedDenoiser, act_scales: Tensor, inputs: Inputs
) -> None:
    attention = quantized.layer(TO_Q.removesuffix(".to_q"))
    quantizers = {name: quantized.layer(f"{TO_Q[:-1]}{name}").input_quantizer for name in "qkv"}
    seen: list[Tensor] = []
    quantizers["q"].register_forward_hook(lambda _module, _args, output: seen.append(output))
    quantized(*inputs, act_scales[inputs[1]])
    assert quantizers["q"] is quantizers["k"] is quantizers["v"]
    assert len(seen) == 3
    assert seen[0] is seen[1] is seen[2]
    attention.to_v = torch.nn.Linear(8, 8).double()  # the third reader does not come
    expected = quantized(*inputs, act_scales[inputs[1]])
    other = (inputs[0] + 1, *inputs[1:])
    assert not torch.equal(quantized(*other, act_scales[inputs[1]]), expected)
    assert torch.equal(quantized(*inputs, act_scales[inputs[1]]), expected)
    kept = [module._kept for module in quantized.modules() if isinstance(module, InputQuantizer)]
    assert kept
    assert kept == [None] * len(kept)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_a_quantizer_per_layer(
    float_denoiser: IndexedDenoiser,
    quantized: QuantizedDenoiser,
    plan: PrecisionPlan,
    act_scales: Tensor,
    inputs: Inputs,
    checkpointing: bool,
) -> None:
    def gradients(denoiser: QuantizedDenoiser) -> list[Tensor]:
        scales = act_scales[inputs[1]].requires_grad_()
        weight = denoiser.layer(TO_Q).weight.requires_grad_()
        denoiser.within(scales, lambda inner: inner(*inputs).square().mean().backward())
        assert scales.grad is not None
        assert weight.grad is not None
        return [scales.grad, weight.grad]

    class Lonely(InputQuantizer):
        def forward(self, x: Tensor) -> Tensor:
            self.forget()
            return super().forward(x)

    weight_scales = starting_weight_scales(float_denoiser, plan, Scales())
    alone = QuantizedDenoiser(copy.deepcopy(float_denoiser), plan, weight_scales, input_quantizer=Lonely).double()
    expected = gradients(alone.requires_grad_(requires_grad=False))
    if checkpointing:
        quantized.inner.network.enable_gradient_checkpointing()
        quantized.train()
    for found, wanted in zip(gradients(quantized), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_layer_without_a_scale_raises_before_and_after_a_call(
    quantized: QuantizedDenoiser, act_scales: Tensor, inputs: Inputs
) -> None:
    x = torch.zeros(3, 64, 8, dtype=torch.float64)
    for _ in range(2):
        with pytest.raises(S2PError, match=f"layer {TO_Q} was reached without an activation scale"):
            quantized.layer(TO_Q)(x)
        quantized(*inputs, act_scales[inputs[1]])


def test_recipe_fp_changes_no_bit(float_denoiser: IndexedDenoiser, inputs: Inputs) -> None:
    float_denoiser.double()
    expected = float_denoiser(*inputs)
    plan = plan_from_recipe(Recipe.load("fp"), discover_layers(float_denoiser))
    assert torch.equal(QuantizedDenoiser(float_denoiser, plan, {})(*inputs, torch.ones(len(inputs[0]), 0)), expected)


def test_baked_weights_give_the_same_output(
    float_denoiser: IndexedDenoiser,
    plan: PrecisionPlan,
    quantized: QuantizedDenoiser,
    act_scales: Tensor,
    inputs: Inputs,
) -> None:
    scales = quantized.weight_scales()
    baked = QuantizedDenoiser(float_denoiser.double(), plan, scales, bake=True)
    scales_of_batch = act_scales[inputs[1]]
    torch.testing.assert_close(baked(*inputs, scales_of_batch), quantized(*inputs, scales_of_batch))
    assert baked.weight_scales() == {}


@pytest.mark.parametrize("kind", [torch.nn.Linear, torch.nn.Conv2d])
def test_a_shift_changes_nothing_in_a_layer_whose_weights_alone_are_rounded(kind: type[torch.nn.Module]) -> None:
    """Q(W) (x - k) + Q(W) k = Q(W) x: with W k in its place rounding would cost k times as much."""
    torch.manual_seed(0)
    size, shape = ((1,), (2, 6, 5, 5)) if kind is torch.nn.Conv2d else ((), (2, 5, 6))
    plain = kind(6, 4, *size).double()
    shifted, shift = ShiftedLayer(copy.deepcopy(plain)), 10 * torch.randn(6, dtype=torch.float64)
    shifted.set_shift(shift)
    scale = plain.weight.detach().abs().amax(tuple(range(1, plain.weight.dim())), keepdim=True) / 7
    make = QuantizedConv2d if kind is torch.nn.Conv2d else QuantizedLinear
    layers = [make(each, torch.nn.Identity(), WeightQuantizer(scale, INT4)) for each in (plain, shifted.layer)]
    layers[1].follow_shift(shift, shifted.layer.weight)
    shifted.layer = layers[1]
    x = torch.randn(shape, dtype=torch.float64)
    expected, found = layers[0](x), shifted(x)
    torch.testing.assert_close(found, expected)
    assert (expected - plain(x)).abs().max() > 0.01
    for output, layer in ((expected, layers[0]), (found, layers[1])):
        output.square().sum().backward()
        assert layer.weight.grad is not None
    torch.testing.assert_close(layers[1].weight.grad, layers[0].weight.grad)
    again = make(layers[1], torch.nn.Identity(), torch.nn.Identity())  # as a search makes it, of what is on the grid
    again.weight = torch.nn.Parameter(fake_quantize(plain.weight.detach(), scale, INT4))
    shifted.layer = again
    torch.testing.assert_close(shifted(x), expected)


def test_the_bias_that_follows_the_codes_is_not_rounded_by_autocast() -> None:
    torch.manual_seed(1)
    plain, shift = torch.nn.Linear(64, 8), 10 * torch.randn(64)
    layer = QuantizedLinear(plain, torch.nn.Identity(), WeightQuantizer(torch.full((8, 1), 0.02), INT4))
    layer.follow_shift(shift, plain.weight)
    expected = layer.on_grid(layer.weight, layer.bias)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer.on_grid(layer.weight, layer.bias)
    for one, other in zip(found, expected, strict=True):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one, other)


def test_a4_is_the_four_bit_grid(float_denoiser: IndexedDenoiser, recipe: Recipe, inputs: Inputs) -> None:
    rules = (*recipe.rules, Rule(match=TO_Q, activations="int4"))
    plan = plan_from_recipe(recipe.model_copy(update={"rules": rules}), discover_layers(float_denoiser))
    denoiser = QuantizedDenoiser(float_denoiser, plan, starting_weight_scales(float_denoiser, plan, Scales()))
    codes = denoiser.layer(TO_Q).input_quantizer.codes(torch.linspace(-9, 9, 64).view(1, 8, 8), torch.ones(1))
    assert (codes.min(), codes.max()) == (-8, 7)


def test_names_and_kinds_stay_the_indexed_denoisers(float_denoiser: IndexedDenoiser, plan: PrecisionPlan) -> None:
    before = {name: tuple(value.shape) for name, value in float_denoiser.state_dict().items()}
    layers = discover_layers(float_denoiser)
    denoiser = QuantizedDenoiser(float_denoiser, plan, starting_weight_scales(float_denoiser, plan, Scales()))
    assert {name: tuple(value.shape) for name, value in denoiser.inner_state().items()} == before
    assert {type(denoiser.layer(layer.name)) for layer in layers} == {QuantizedConv2d, QuantizedLinear}


def test_a_plan_of_another_denoiser_is_refused(float_denoiser: IndexedDenoiser, plan: PrecisionPlan) -> None:
    with pytest.raises(InputError, match="layer conv_in has int8 weights in the plan and no weight scale"):
        QuantizedDenoiser(float_denoiser, plan, {})
