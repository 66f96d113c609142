from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch

from s2p_deploy.errors import InputError
from s2p_deploy.families import (
    HotDenoiser,
    LowRankLinear,
    SmoothedLinear,
    apply_transforms,
    discover_sites,
    hot_denoiser,
    module_of_kind,
    network_config,
    new_hot_denoiser,
    readers_by_tensor,
    time_table_of,
)
from s2p_deploy.records import TransformSpec

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

BLOCK = "mid_block.attentions.0.transformer_blocks.0"
QUERY, KEY, VALUE = (f"{BLOCK}.attn1.to_{name}" for name in "qkv")
TEXT_KEY, CONV = f"{BLOCK}.attn2.to_k", "up_blocks.0.resnets.0.conv1"
SPEC = TransformSpec({CONV: 16}, (QUERY, KEY, VALUE, TEXT_KEY), {f"{QUERY}.layer": 3, f"{BLOCK}.ff.net.2": 2})


@pytest.fixture
def hot(tiny_unet: UNet2DConditionModel) -> HotDenoiser:
    return hot_denoiser(tiny_unet, time_table_of(tiny_unet, 10)).eval()


@torch.no_grad()
def draw(hot: HotDenoiser) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 12, generator=generator)
    return hot(sample, torch.tensor([3, 9]), text)


def everything(hot: HotDenoiser) -> TransformSpec:
    linears = tuple(site.name for site in discover_sites(hot) if site.op == "linear")
    return TransformSpec(hot.kind.split_shortcuts(hot.network), linears, {f"{name}.layer": 2 for name in linears})


def test_fresh_rewrites_of_everything_compute_the_same(hot: HotDenoiser) -> None:
    expected = draw(hot)
    apply_transforms(hot, everything(hot))
    assert torch.allclose(draw(hot), expected, atol=1e-5)


def test_a_rewrite_draws_no_random_number(hot: HotDenoiser) -> None:
    before = torch.get_rng_state()
    apply_transforms(hot, SPEC)
    assert torch.equal(torch.get_rng_state(), before)


def test_names_of_parameters_are_those_of_the_spec(hot: HotDenoiser) -> None:
    before = set(hot.state_dict())
    apply_transforms(hot, SPEC)
    added, gone = set(hot.state_dict()) - before, before - set(hot.state_dict())
    assert f"network.{QUERY}.weight" in gone
    paths = {name.removeprefix("network.") for name in added}
    assert {name for name in paths if name.startswith(CONV)} == {
        f"{CONV}.head.weight",
        f"{CONV}.head.bias",
        f"{CONV}.skip.weight",
    }
    assert {name for name in paths if name.startswith(QUERY)} == {
        f"{QUERY}.factor",
        f"{QUERY}.layer.down.weight",
        f"{QUERY}.layer.up.weight",
        f"{QUERY}.layer.residual.weight",
    }
    branch = f"{BLOCK}.ff.net.2"
    assert {name for name in paths if name.startswith(branch)} == {
        f"{branch}.{part}" for part in ("residual.weight", "residual.bias", "down.weight", "up.weight")
    }


def test_a_split_by_hand(hot: HotDenoiser) -> None:
    conv = torch.nn.Conv2d(3, 1, 1)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([1.0, 10.0, 100.0]).view(1, 3, 1, 1))
        conv.bias.fill_(0.5)
    hot.network.register_module("conv", conv)
    apply_transforms(hot, TransformSpec({"conv": 2}))
    split = hot.network.conv
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


@torch.no_grad()
def test_the_branch_holds_the_best_approximation_of_its_rank() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 5)
    weight, x = linear.weight.detach().clone(), torch.randn(4, 6)
    expected = linear(x)
    low_rank = LowRankLinear(linear, 2)
    low_rank.decompose()
    values = torch.linalg.svdvals(weight)
    assert low_rank.residual.weight.norm() == pytest.approx(float(values[2:].norm()), rel=1e-5)  # Eckart and Young
    assert torch.linalg.svdvals(low_rank.up.weight @ low_rank.down.weight)[2:].max() < 1e-6
    assert torch.allclose(low_rank(x), expected, atol=1e-6)
    low_rank.decompose()
    assert torch.allclose(low_rank.whole_weight(), weight, atol=1e-6), "a second time changes nothing"


@torch.no_grad()
def test_a_factor_behind_which_a_branch_stands() -> None:
    torch.manual_seed(0)
    smoothed = SmoothedLinear(torch.nn.Linear(6, 5))
    x = torch.randn(4, 6)
    expected, weight = smoothed(x), smoothed.layer.weight.clone()
    smoothed.layer = LowRankLinear(smoothed.layer, 2)
    smoothed.layer.decompose()
    smoothed.set_factor(torch.rand(6) + 0.1)
    assert torch.allclose(smoothed(x), expected, atol=1e-5)
    assert torch.allclose(smoothed.plain_weight(), weight, atol=1e-5)


def test_rewrites_on_the_meta_device_have_the_names_and_shapes_of_real_ones(
    hot: HotDenoiser, tiny_unet: UNet2DConditionModel
) -> None:
    config, table = network_config(hot.network), time_table_of(new_unet(tiny_unet), 10)
    with torch.device("meta"):
        empty = new_hot_denoiser(config, table).to("meta")
        apply_transforms(empty, SPEC)
    apply_transforms(hot, SPEC)
    assert {name: value.shape for name, value in empty.state_dict().items()} == {
        name: value.shape for name, value in hot.state_dict().items()
    }
    assert all(value.is_meta for value in empty.state_dict().values())
    assert [site.name for site in discover_sites(empty)] == [site.name for site in discover_sites(hot)]


def new_unet(like: UNet2DConditionModel) -> UNet2DConditionModel:
    return type(like).from_config(like.config)


def test_a_stored_state_goes_into_a_fresh_rewrite(hot: HotDenoiser, tiny_unet: UNet2DConditionModel) -> None:
    fresh = copy.deepcopy(hot)
    apply_transforms(hot, SPEC)
    module_of_kind(hot, QUERY, SmoothedLinear).set_factor(torch.rand(16) + 0.5)
    module_of_kind(hot, f"{QUERY}.layer", LowRankLinear).decompose()
    apply_transforms(fresh, SPEC)
    fresh.load_state_dict(hot.state_dict())
    assert torch.equal(draw(fresh), draw(hot))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (TransformSpec({"up_blocks.9.conv": 4}), r"up_blocks\.9\.conv is not in this denoiser"),
        (TransformSpec({QUERY: 4}), r"attn1\.to_q is a Linear, not a Conv2d"),
        (TransformSpec({"conv_in": 4}), "conv_in cannot be split after 4 of 4 input channels"),
        (TransformSpec({"conv_in": 0}), "conv_in cannot be split after 0 of 4 input channels"),
        (TransformSpec(smoothed=("conv_in",)), "conv_in is a Conv2d, not a Linear"),
        (TransformSpec(smoothed=(QUERY, QUERY)), r"attn1\.to_q is a SmoothedLinear, not a Linear: .* already there"),
        (TransformSpec(low_rank={QUERY: 17}), "16 inputs and 16 outputs, too few for a branch of rank 17"),
        (TransformSpec(low_rank={QUERY: 0}), "rank 0"),
        (TransformSpec(smoothed=(QUERY,), low_rank={QUERY: 2}), "SmoothedLinear, not a Linear"),
    ],
)
def test_a_spec_of_another_denoiser(hot: HotDenoiser, spec: TransformSpec, message: str) -> None:
    with pytest.raises(InputError, match=message):
        apply_transforms(hot, spec)


def test_sites_of_a_transformed_denoiser(hot: HotDenoiser) -> None:
    apply_transforms(hot, SPEC)
    sites = {site.name: site for site in discover_sites(hot)}
    assert {name for name, site in sites.items() if site.branch} == {
        f"{path}.{half}" for path in SPEC.low_rank for half in ("down", "up")
    }
    inner = (f"{CONV}.head", f"{CONV}.skip", f"{QUERY}.layer.residual", f"{KEY}.layer", f"{TEXT_KEY}.layer")
    assert set(inner) <= set(sites)
    assert {QUERY, f"{QUERY}.layer", CONV, TEXT_KEY}.isdisjoint(sites)
    assert sites[f"{QUERY}.layer.residual"].tensor == sites[f"{QUERY}.layer.down"].tensor
    assert len({sites[name].tensor for name in inner}) == len(inner), "smoothed readers of one tensor read their own"
    assert sites[f"{TEXT_KEY}.layer"].reads == "text", "behind its factor too"
    assert sites[f"{KEY}.layer"].reads == "activation"


def test_a_branch_of_a_text_site_reads_the_text_to_its_end(hot: HotDenoiser) -> None:
    apply_transforms(hot, TransformSpec(low_rank={TEXT_KEY: 2}))
    sites = {site.name: site for site in discover_sites(hot)}
    assert all(sites[f"{TEXT_KEY}.{part}"].reads == "text" for part in ("residual", "down", "up"))


def test_smoothed_modules_are_grouped_by_the_tensor_before_their_factor(hot: HotDenoiser) -> None:
    apply_transforms(hot, SPEC)
    assert readers_by_tensor(hot, SPEC.smoothed) == ((QUERY, KEY, VALUE), (TEXT_KEY,))
