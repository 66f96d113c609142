from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch

from s2p_deploy.calib.quantization.fit_transforms import fit_transforms, set_smoothing, smoothing_factor, transform_spec
from s2p_deploy.errors import InputError, S2PError
from s2p_deploy.families import (
    HotDenoiser,
    LowRankLinear,
    SmoothedLinear,
    apply_transforms,
    module_of_kind,
)
from s2p_deploy.progress import silent
from s2p_deploy.recipe import Transforms
from s2p_deploy.records import TransformSpec

if TYPE_CHECKING:
    from s2p_deploy.records import LatentDataset

BLOCK = "mid_block.attentions.0.transformer_blocks.0"
QUERY, KEY, VALUE = (f"{BLOCK}.attn1.to_{name}" for name in "qkv")
TEXT_KEY, TEXT_VALUE = f"{BLOCK}.attn2.to_k", f"{BLOCK}.attn2.to_v"
OUT = f"{BLOCK}.ff.net.2"
LINEARS = (QUERY, KEY, VALUE, TEXT_KEY, TEXT_VALUE, OUT)
ALL = Transforms(split_shortcut="all", smoothing=0.5, low_rank=2)


@torch.no_grad()
def draw(hot: HotDenoiser, dataset: LatentDataset) -> torch.Tensor:
    sample = torch.from_numpy(dataset.latents[:4]).float()
    texts = torch.from_numpy(dataset.texts[dataset.cond_text[dataset.prompt[:4]]])
    return hot(sample, torch.from_numpy(dataset.rows[:4]), texts)


def fitted(hot: HotDenoiser, transforms: Transforms, dataset: LatentDataset) -> TransformSpec:
    spec = transform_spec(hot, transforms, LINEARS)
    apply_transforms(hot, spec)
    fit_transforms(hot, spec, transforms, dataset, silent)
    return spec


def test_what_a_recipe_asks_for(hot: HotDenoiser) -> None:
    assert transform_spec(hot, Transforms(), LINEARS) == TransformSpec()
    assert transform_spec(hot, Transforms(smoothing=0.0), LINEARS) == TransformSpec(smoothed=LINEARS)
    assert transform_spec(hot, Transforms(low_rank=3), (QUERY,)) == TransformSpec(low_rank={QUERY: 3})
    spec = transform_spec(hot, ALL, LINEARS)
    assert spec.split == hot.kind.split_shortcuts(hot.network)
    assert spec.low_rank == {f"{name}.layer": 2 for name in LINEARS}


def test_a_rank_above_a_layers_size_is_its_size(hot: HotDenoiser) -> None:
    assert transform_spec(hot, Transforms(low_rank=32), (QUERY, OUT)).low_rank == {QUERY: 16, OUT: 16}


def test_a_layer_that_is_not_there(hot: HotDenoiser) -> None:
    with pytest.raises(InputError, match="conv_in is a Conv2d, not a Linear"):
        transform_spec(hot, Transforms(low_rank=2), ("conv_in",))


def test_a_fitted_denoiser_computes_the_same(hot: HotDenoiser, dataset: LatentDataset) -> None:
    plain = copy.deepcopy(hot)
    spec = fitted(hot, ALL, dataset)
    assert torch.allclose(draw(hot, dataset), draw(plain, dataset), atol=1e-4)
    for path in spec.smoothed:
        module, weight = module_of_kind(hot, path, SmoothedLinear), plain.network.get_submodule(path).weight
        assert (module.factor - 1).abs().max() > 0.1, path
        assert torch.allclose(module.plain_weight(), weight, atol=1e-5), path
    for path in spec.low_rank:
        branch = module_of_kind(hot, path, LowRankLinear)
        assert branch.residual.weight.norm() < branch.whole_weight().norm(), path


@torch.no_grad()
def test_the_branch_takes_the_smoothed_weight(hot: HotDenoiser, dataset: LatentDataset) -> None:
    weight = hot.network.get_submodule(QUERY).weight.clone()
    fitted(hot, ALL, dataset)
    module = module_of_kind(hot, QUERY, SmoothedLinear)
    rest = torch.linalg.svdvals(weight * module.factor)[2:].norm()
    assert module.layer.residual.weight.norm() == pytest.approx(float(rest), rel=1e-4)


@torch.no_grad()
def test_factors_are_those_of_all_rows_and_both_branches(hot: HotDenoiser, dataset: LatentDataset) -> None:
    """Peaks by hand: every stored point with either text, one call each; q, k and v share the largest weights."""
    seen: dict[str, list[torch.Tensor]] = {QUERY: [], TEXT_KEY: [], OUT: []}
    plain = copy.deepcopy(hot)
    for path, peaks in seen.items():
        plain.network.get_submodule(path).register_forward_pre_hook(
            lambda _, args, peaks=peaks: peaks.append(args[0][0].abs().amax(0))
        )
    for index, prompt in enumerate(dataset.prompt):
        for text in (dataset.cond_text[prompt], dataset.uncond_text[prompt]):
            sample = torch.from_numpy(dataset.latents[[index]]).float()
            plain(sample, torch.tensor([dataset.rows[index]]), torch.from_numpy(dataset.texts[[text]]))
    fitted(hot, Transforms(smoothing=0.7), dataset)
    groups = {QUERY: (QUERY, KEY, VALUE), TEXT_KEY: (TEXT_KEY, TEXT_VALUE), OUT: (OUT,)}
    for first, group in groups.items():
        weights = torch.stack([plain.network.get_submodule(path).weight.abs().amax(0) for path in group]).amax(0)
        expected = torch.stack(seen[first]).amax(0) ** 0.7 / weights**0.3
        for path in group:
            assert torch.allclose(hot.network.get_submodule(path).factor, expected, rtol=1e-4), path


def test_fewer_latents_see_less(hot: HotDenoiser, dataset: LatentDataset) -> None:
    spec, other = transform_spec(hot, ALL, LINEARS), copy.deepcopy(hot)
    for denoiser, latents in ((hot, 64), (other, 1)):
        apply_transforms(denoiser, spec)
        fit_transforms(denoiser, spec, ALL, dataset, silent, latents=latents)
    most, few = (denoiser.network.get_submodule(OUT).factor for denoiser in (hot, other))
    assert (most >= few * (1 - 1e-5)).all()
    assert (most > few).any()


def test_a_factor_by_hand() -> None:
    inputs, weights = torch.tensor([16.0, 4.0, 0.0]), torch.tensor([4.0, 1.0, 0.25])
    assert smoothing_factor(inputs, weights, 0.5).tolist() == pytest.approx([2.0, 2.0, (16e-5 / 0.25) ** 0.5])
    assert smoothing_factor(inputs, weights, 1.0)[:2].tolist() == [16.0, 4.0]
    assert smoothing_factor(inputs, weights, 0.0).tolist() == [0.25, 1.0, 4.0]


@pytest.mark.parametrize("silent_side", [0, 1])
def test_a_tensor_of_zeros_is_not_smoothed(silent_side: int) -> None:
    peaks = [torch.tensor([2.0, 3.0]), torch.tensor([2.0, 3.0])]
    peaks[silent_side] = torch.zeros(2)
    assert smoothing_factor(*peaks, 0.5).tolist() == [1.0, 1.0]


def test_smoothing_factors_from_elsewhere(hot: HotDenoiser, dataset: LatentDataset) -> None:
    plain = copy.deepcopy(hot)
    apply_transforms(hot, TransformSpec(smoothed=(QUERY,)))
    factor = torch.linspace(0.5, 2.0, 16)
    set_smoothing(hot, {QUERY: factor})
    module, weight = module_of_kind(hot, QUERY, SmoothedLinear), plain.network.get_submodule(QUERY).weight
    assert torch.equal(module.factor, factor)
    assert torch.allclose(module.layer.weight, weight * factor)
    assert torch.allclose(draw(hot, dataset), draw(plain, dataset), atol=1e-5)


@pytest.mark.parametrize(
    ("path", "factor", "message"),
    [
        (KEY, torch.ones(16), "to_k is a Linear, not a SmoothedLinear"),
        ("nowhere", torch.ones(16), "nowhere is not in this denoiser"),
        (QUERY, torch.ones(15), r"to_q must be 16 finite numbers above zero, got \[15\]"),
        (QUERY, torch.zeros(16), "minimum 0.0"),
        (QUERY, torch.full((16,), torch.inf), "minimum inf"),
    ],
)
def test_wrong_factors(hot: HotDenoiser, path: str, factor: torch.Tensor, message: str) -> None:
    apply_transforms(hot, TransformSpec(smoothed=(QUERY,)))
    with pytest.raises(InputError, match=message):
        set_smoothing(hot, {path: factor})


def test_broken_weights_are_named(hot: HotDenoiser, dataset: LatentDataset) -> None:
    with torch.no_grad():
        hot.network.conv_in.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(S2PError, match="is not finite"):
        fitted(hot, ALL, dataset)
    assert not any(module._forward_pre_hooks for module in hot.modules())


def test_progress_ends_where_it_says(hot: HotDenoiser, dataset: LatentDataset) -> None:
    spec, told = transform_spec(hot, ALL, LINEARS), []
    apply_transforms(hot, spec)
    fit_transforms(hot, spec, ALL, dataset, lambda stage, done, total: told.append((stage, done, total)))
    calls = 2 * len(dataset.rows)  # either branch of every point: no row has more than the 64 that are looked at
    assert ("smoothing", calls, calls) in told
    assert told[-len(LINEARS) :] == [("low-rank branches", i + 1, len(LINEARS)) for i in range(len(LINEARS))]
