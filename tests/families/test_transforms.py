from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch

from s2p_deploy.errors import InputError
from s2p_deploy.families import (
    IndexedDenoiser,
    ShiftedLayer,
    SmoothedLinear,
    apply_transforms,
    discover_layers,
    indexed_denoiser,
    layers_behind_norms,
    module_of_type,
    network_config,
    new_indexed_denoiser,
    readers_by_tensor,
    set_norm_shift,
    time_table_of,
)
from s2p_deploy.records import TransformSpec

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

BLOCK = "mid_block.attentions.0.transformer_blocks.0"
QUERY, KEY, VALUE = (f"{BLOCK}.attn1.to_{name}" for name in "qkv")
TEXT_KEY, CONV = f"{BLOCK}.attn2.to_k", "up_blocks.0.resnets.0.conv1"
NORM = f"{BLOCK}.norm1"
PADDED, OUT = "mid_block.resnets.0.conv2", f"{BLOCK}.attn1.to_out.0"
SPEC = TransformSpec({CONV: 16}, (QUERY, KEY, VALUE, TEXT_KEY), (PADDED, f"{CONV}.skip", OUT))


@pytest.fixture
def float_denoiser(tiny_unet: UNet2DConditionModel) -> IndexedDenoiser:
    return indexed_denoiser(tiny_unet, time_table_of(tiny_unet, 10)).eval()


@torch.no_grad()
def draw(float_denoiser: IndexedDenoiser) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 12, generator=generator)
    return float_denoiser(sample, torch.tensor([3, 9]), text)


def everything(float_denoiser: IndexedDenoiser) -> TransformSpec:
    splits = float_denoiser.family.split_shortcuts(float_denoiser.network)
    linears = tuple(layer.name for layer in discover_layers(float_denoiser) if layer.op == "linear")
    convolutions = tuple(layer.name for layer in discover_layers(float_denoiser) if layer.op == "conv")
    halves = tuple(f"{path}.{half}" for path in splits for half in ("head", "skip"))
    shifted = (*(name for name in convolutions if name not in splits), *halves, *(f"{name}.layer" for name in linears))
    return TransformSpec(splits, linears, shifted)


def test_fresh_rewrites_of_everything_compute_the_same(float_denoiser: IndexedDenoiser) -> None:
    expected = draw(float_denoiser)
    apply_transforms(float_denoiser, everything(float_denoiser))
    assert torch.allclose(draw(float_denoiser), expected, atol=1e-5)
    generator = torch.Generator().manual_seed(2)
    for module in float_denoiser.modules():
        if isinstance(module, ShiftedLayer):
            module.set_shift(torch.randn(module.shift.shape, generator=generator))
    assert torch.allclose(draw(float_denoiser), expected, atol=1e-4), "at the borders too"


def test_a_rewrite_draws_no_random_number(float_denoiser: IndexedDenoiser) -> None:
    before = torch.get_rng_state()
    apply_transforms(float_denoiser, SPEC)
    assert torch.equal(torch.get_rng_state(), before)


def test_names_of_parameters_are_those_of_the_spec(float_denoiser: IndexedDenoiser) -> None:
    before = set(float_denoiser.state_dict())
    apply_transforms(float_denoiser, SPEC)
    added, gone = set(float_denoiser.state_dict()) - before, before - set(float_denoiser.state_dict())
    assert f"network.{QUERY}.weight" in gone
    paths = {name.removeprefix("network.") for name in added}
    assert {name for name in paths if name.startswith(CONV)} == {
        f"{CONV}.head.weight",
        f"{CONV}.head.bias",
        f"{CONV}.skip.shift",
        f"{CONV}.skip.layer.weight",
        f"{CONV}.skip.layer.bias",
    }
    assert {name for name in paths if name.startswith(QUERY)} == {
        f"{QUERY}.factor",
        f"{QUERY}.layer.weight",
    }


def test_a_split_by_hand(float_denoiser: IndexedDenoiser) -> None:
    conv = torch.nn.Conv2d(3, 1, 1)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([1.0, 10.0, 100.0]).view(1, 3, 1, 1))
        conv.bias.fill_(0.5)
    float_denoiser.network.register_module("conv", conv)
    apply_transforms(float_denoiser, TransformSpec({"conv": 2}))
    split = float_denoiser.network.conv
    x = torch.tensor([2.0, 3.0, 4.0]).view(1, 3, 1, 1)
    assert split.head(x[:, :2]).item() == 32.5
    assert split.skip(x[:, 2:]).item() == 400.0
    assert split(x).item() == 432.5


def test_smoothing_by_hand() -> None:
    smoothed = SmoothedLinear(torch.nn.Linear(2, 1))
    with torch.no_grad():
        smoothed.layer.weight.copy_(torch.tensor([[3.0, 5.0]]))
        smoothed.layer.bias.fill_(1.0)
    smoothed.set_factor(torch.tensor([2.0, 0.5]))
    assert smoothed.layer.weight.tolist() == [[6.0, 2.5]]
    smoothed.set_factor(torch.tensor([4.0, 1.0]))  # from there, not on top
    assert smoothed.layer.weight.tolist() == [[12.0, 5.0]]
    assert smoothed.plain_weight().tolist() == [[3.0, 5.0]]
    assert smoothed(torch.tensor([[1.0, 2.0]])).item() == 14.0


def test_a_shift_by_hand() -> None:
    linear = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[3.0, 5.0]]))
    shifted = ShiftedLayer(linear)
    shifted.set_shift(torch.tensor([2.0, -1.0]))
    assert shifted.layer.bias.tolist() == [1.0]  # 3 * 2 - 5 * 1
    seen: list[torch.Tensor] = []
    shifted.layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert shifted(torch.tensor([[1.0, 2.0]])).item() == 13.0
    assert seen[0].tolist() == [[-1.0, 3.0]]
    shifted.set_shift(torch.tensor([0.0, 1.0]))  # from there, not on top
    assert shifted.layer.bias.tolist() == [5.0]


def test_a_norms_shift_by_hand(float_denoiser: IndexedDenoiser) -> None:
    norm, linear = torch.nn.LayerNorm(2), torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        norm.bias.copy_(torch.tensor([1.0, 0.0]))
        linear.weight.copy_(torch.tensor([[3.0, 5.0]]))
    float_denoiser.network.register_module("norm", norm)
    float_denoiser.network.register_module("linear", linear)
    apply_transforms(float_denoiser, TransformSpec(shifted_norms={"norm": ("linear",)}))
    assert linear.bias.tolist() == [0.0]
    set_norm_shift(float_denoiser, "norm", ("linear",), torch.tensor([2.0, -1.0]))
    assert norm.bias.tolist() == [-1.0, 1.0]
    assert linear.bias.tolist() == [1.0]  # 3 * 2 - 5 * 1
    set_norm_shift(float_denoiser, "norm", ("linear",), torch.tensor([0.0, 1.0]))  # from there, not on top
    assert norm.bias.tolist() == [1.0, -1.0]
    assert linear.bias.tolist() == [5.0]
    assert norm.shift.tolist() == [0.0, 1.0]
    x = torch.tensor([[1.0, -1.0]])
    assert linear(norm(x)).item() == pytest.approx(3 * (float((x / (1 + 1e-5) ** 0.5)[0, 0]) + 1) - 5, abs=1e-4)


def test_shifted_norms_leave_what_is_computed(float_denoiser: IndexedDenoiser) -> None:
    expected, norms = draw(float_denoiser), layers_behind_norms(float_denoiser)
    apply_transforms(float_denoiser, TransformSpec(shifted_norms=norms))
    assert torch.equal(draw(float_denoiser), expected), "the shift is zero, and new biases are"
    generator = torch.Generator().manual_seed(2)
    for norm, readers in norms.items():
        shift = float_denoiser.network.get_submodule(norm).shift
        set_norm_shift(float_denoiser, norm, readers, torch.randn(shift.shape, generator=generator))
    assert torch.allclose(draw(float_denoiser), expected, atol=1e-4)
    with pytest.raises(InputError, match="cannot be shifted"):
        apply_transforms(float_denoiser, TransformSpec(shifted_norms=norms))


def test_a_padded_convolution_is_padded_before_its_shift() -> None:
    conv = torch.nn.Conv2d(1, 1, 3, padding=(1, 2), bias=False)
    torch.nn.init.ones_(conv.weight)
    x = torch.full((1, 1, 2, 2), 4.0)
    expected = conv(x)
    shifted = ShiftedLayer(conv)
    shifted.set_shift(torch.tensor([4.0]))
    seen: list[torch.Tensor] = []
    shifted.layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert torch.equal(shifted(x), expected)
    assert seen[0].shape == (1, 1, 4, 6)
    assert seen[0].unique().tolist() == [-4.0, 0.0]


def test_rewrites_on_the_meta_device_have_the_names_and_shapes_of_real_ones(
    float_denoiser: IndexedDenoiser, tiny_unet: UNet2DConditionModel
) -> None:
    config, table = network_config(float_denoiser.network), time_table_of(new_unet(tiny_unet), 10)
    with torch.device("meta"):
        empty = new_indexed_denoiser(config, table).to("meta")
        apply_transforms(empty, SPEC)
    apply_transforms(float_denoiser, SPEC)
    assert {name: value.shape for name, value in empty.state_dict().items()} == {
        name: value.shape for name, value in float_denoiser.state_dict().items()
    }
    assert all(value.is_meta for value in empty.state_dict().values())
    assert [layer.name for layer in discover_layers(empty)] == [layer.name for layer in discover_layers(float_denoiser)]


def new_unet(like: UNet2DConditionModel) -> UNet2DConditionModel:
    return type(like).from_config(like.config)


def test_a_stored_state_goes_into_a_fresh_rewrite(
    float_denoiser: IndexedDenoiser, tiny_unet: UNet2DConditionModel
) -> None:
    fresh = copy.deepcopy(float_denoiser)
    apply_transforms(float_denoiser, SPEC)
    module_of_type(float_denoiser, QUERY, SmoothedLinear).set_factor(torch.rand(16) + 0.5)
    module_of_type(float_denoiser, OUT, ShiftedLayer).set_shift(torch.rand(16))
    apply_transforms(fresh, SPEC)
    fresh.load_state_dict(float_denoiser.state_dict())
    assert torch.equal(draw(fresh), draw(float_denoiser))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (TransformSpec({"up_blocks.9.conv": 4}), r"up_blocks\.9\.conv is not in this denoiser"),
        (TransformSpec({QUERY: 4}), r"attn1\.to_q is a Linear, not a Conv2d"),
        (TransformSpec({"conv_in": 4}), "conv_in cannot be split after 4 of 4 input channels"),
        (TransformSpec({"conv_in": 0}), "conv_in cannot be split after 0 of 4 input channels"),
        (TransformSpec(smoothed=("conv_in",)), "conv_in is a Conv2d, not a Linear"),
        (TransformSpec(shifted=("nowhere",)), "nowhere is not in this denoiser"),
        (TransformSpec(shifted=(OUT, OUT)), r"to_out\.0 cannot be shifted: the transforms are of another denoiser"),
        (TransformSpec(shifted_norms={"nowhere": (QUERY,)}), "nowhere is not in this denoiser"),
        (TransformSpec(shifted_norms={NORM: ("nowhere",)}), "nowhere is not in this denoiser"),
        (TransformSpec(shifted_norms={OUT: (QUERY,)}), r"to_out\.0 cannot be shifted"),
        (TransformSpec(shifted_norms={NORM: (PADDED,)}), r"norm1 cannot be shifted"),
        (TransformSpec(smoothed=(QUERY, QUERY)), r"attn1\.to_q is a SmoothedLinear, not a Linear: .* already there"),
    ],
)
def test_a_spec_of_another_denoiser(float_denoiser: IndexedDenoiser, spec: TransformSpec, message: str) -> None:
    with pytest.raises(InputError, match=message):
        apply_transforms(float_denoiser, spec)


def test_layers_of_a_transformed_denoiser(float_denoiser: IndexedDenoiser) -> None:
    apply_transforms(float_denoiser, SPEC)
    layers = {layer.name: layer for layer in discover_layers(float_denoiser)}
    inner = (
        f"{CONV}.head",
        f"{CONV}.skip.layer",
        f"{OUT}.layer",
        f"{QUERY}.layer",
        f"{KEY}.layer",
        f"{TEXT_KEY}.layer",
    )
    assert set(inner) <= set(layers)
    assert {QUERY, CONV, TEXT_KEY}.isdisjoint(layers)
    assert len({layers[name].tensor for name in inner}) == len(inner), "rewritten readers of one tensor read their own"
    assert layers[f"{TEXT_KEY}.layer"].reads == "text", "behind its factor too"
    assert layers[f"{KEY}.layer"].reads == "activation"


def test_smoothed_modules_are_grouped_by_the_tensor_before_their_factor(float_denoiser: IndexedDenoiser) -> None:
    apply_transforms(float_denoiser, SPEC)
    assert readers_by_tensor(float_denoiser, SPEC.smoothed) == ((QUERY, KEY, VALUE), (TEXT_KEY,))
