from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch

from s2p_deploy.context import silent
from s2p_deploy.errors import InputError, S2PError
from s2p_deploy.families import (
    IndexedDenoiser,
    SmoothedLinear,
    module_of_type,
)
from s2p_deploy.records import TransformSpec
from s2p_research.recipe import ResearchTransforms as Section
from s2p_research.transforms import LowRankLinear, ResearchTransforms, smoothing_factor, transforms_of_linears

if TYPE_CHECKING:
    from s2p_deploy.records import LatentDataset

BLOCK = "mid_block.attentions.0.transformer_blocks.0"
QUERY, KEY, VALUE = (f"{BLOCK}.attn1.to_{name}" for name in "qkv")
TEXT_KEY, TEXT_VALUE = f"{BLOCK}.attn2.to_k", f"{BLOCK}.attn2.to_v"
OUT = f"{BLOCK}.ff.net.2"
LINEARS = (QUERY, KEY, VALUE, TEXT_KEY, TEXT_VALUE, OUT)
ALL = Section(split_shortcut="all", smoothing=0.5, low_rank=2)


@torch.no_grad()
def draw(float_denoiser: IndexedDenoiser, dataset: LatentDataset) -> torch.Tensor:
    sample = torch.from_numpy(dataset.latents[:4]).float()
    texts = torch.from_numpy(dataset.texts[dataset.cond_text[dataset.prompt[:4]]]).float()
    return float_denoiser(sample, torch.from_numpy(dataset.timestep_indices[:4]), texts)


def transforms_of(
    denoiser: IndexedDenoiser, section: Section, linears: tuple[str, ...] = LINEARS, latents: int = 64
) -> ResearchTransforms:
    splits = denoiser.family.split_shortcuts(denoiser.network) if section.split_shortcut == "all" else {}
    return transforms_of_linears(denoiser, TransformSpec(split=splits), section, linears, latents)


def fitted(float_denoiser: IndexedDenoiser, section: Section, dataset: LatentDataset) -> ResearchTransforms:
    transforms = transforms_of(float_denoiser, section)
    transforms.apply(float_denoiser)
    transforms.fit(float_denoiser, dataset, silent)
    return transforms


def test_what_a_recipe_says(float_denoiser: IndexedDenoiser) -> None:
    assert transforms_of(float_denoiser, Section()).spec == TransformSpec()
    assert transforms_of(float_denoiser, Section(smoothing=0.0)).spec == TransformSpec(smoothed=LINEARS)
    branches = transforms_of(float_denoiser, Section(low_rank=3), (QUERY,))
    assert branches.low_rank == {QUERY: 3}
    assert [rule.match for rule in branches.rules] == [f"{QUERY}.down", f"{QUERY}.up"]
    assert transforms_of(float_denoiser, ALL).low_rank == {f"{name}.layer": 2 for name in LINEARS}


def test_a_rank_above_a_layers_size_is_its_size(float_denoiser: IndexedDenoiser) -> None:
    assert transforms_of(float_denoiser, Section(low_rank=32), (QUERY, OUT)).low_rank == {QUERY: 16, OUT: 16}


def test_a_layer_that_is_not_there(float_denoiser: IndexedDenoiser) -> None:
    with pytest.raises(InputError, match="conv_in is a Conv2d, not a Linear"):
        transforms_of(float_denoiser, Section(low_rank=2), ("conv_in",))


def test_a_fitted_denoiser_computes_the_same(float_denoiser: IndexedDenoiser, dataset: LatentDataset) -> None:
    plain = copy.deepcopy(float_denoiser)
    transforms = fitted(float_denoiser, ALL, dataset)
    assert torch.allclose(draw(float_denoiser, dataset), draw(plain, dataset), atol=1e-4)
    for path in transforms.spec.smoothed:
        module, weight = module_of_type(float_denoiser, path, SmoothedLinear), plain.network.get_submodule(path).weight
        assert (module.factor - 1).abs().max() > 0.1, path
        assert torch.allclose(module.layer.whole_weight() / module.factor, weight, atol=1e-5), path
    for path in transforms.low_rank:
        branch = module_of_type(float_denoiser, path, LowRankLinear)
        assert branch.residual.weight.norm() < branch.whole_weight().norm(), path


@torch.no_grad()
def test_the_branch_takes_the_smoothed_weight(float_denoiser: IndexedDenoiser, dataset: LatentDataset) -> None:
    weight = float_denoiser.network.get_submodule(QUERY).weight.clone()
    fitted(float_denoiser, ALL, dataset)
    module = module_of_type(float_denoiser, QUERY, SmoothedLinear)
    rest = torch.linalg.svdvals(weight * module.factor)[2:].norm()
    assert module.layer.residual.weight.norm() == pytest.approx(float(rest), rel=1e-4)


@torch.no_grad()
def test_factors_are_those_of_all_rows_and_both_branches(
    float_denoiser: IndexedDenoiser, dataset: LatentDataset
) -> None:
    """Peaks by hand: every stored point with either text, one call each; q, k and v share the largest weights."""
    seen: dict[str, list[torch.Tensor]] = {QUERY: [], TEXT_KEY: [], OUT: []}
    plain = copy.deepcopy(float_denoiser)
    for path, peaks in seen.items():
        plain.network.get_submodule(path).register_forward_pre_hook(
            lambda _, args, peaks=peaks: peaks.append(args[0][0].abs().amax(0))
        )
    for index, prompt in enumerate(dataset.prompt):
        for text in (dataset.cond_text[prompt], dataset.uncond_text[prompt]):
            sample = torch.from_numpy(dataset.latents[[index]]).float()
            plain(
                sample, torch.tensor([dataset.timestep_indices[index]]), torch.from_numpy(dataset.texts[[text]]).float()
            )
    fitted(float_denoiser, Section(smoothing=0.7), dataset)
    groups = {QUERY: (QUERY, KEY, VALUE), TEXT_KEY: (TEXT_KEY, TEXT_VALUE), OUT: (OUT,)}
    for first, group in groups.items():
        weights = torch.stack([plain.network.get_submodule(path).weight.abs().amax(0) for path in group]).amax(0)
        expected = torch.stack(seen[first]).amax(0) ** 0.7 / weights**0.3
        for path in group:
            assert torch.allclose(float_denoiser.network.get_submodule(path).factor, expected, rtol=1e-4), path


def test_fewer_latents_see_less(float_denoiser: IndexedDenoiser, dataset: LatentDataset) -> None:
    other = copy.deepcopy(float_denoiser)
    for denoiser, latents in ((float_denoiser, 64), (other, 1)):
        transforms = transforms_of(denoiser, ALL, latents=latents)
        transforms.apply(denoiser)
        transforms.fit(denoiser, dataset, silent)
    most, few = (denoiser.network.get_submodule(OUT).factor for denoiser in (float_denoiser, other))
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


def test_broken_weights_are_named(float_denoiser: IndexedDenoiser, dataset: LatentDataset) -> None:
    with torch.no_grad():
        float_denoiser.network.conv_in.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(S2PError, match="is not finite"):
        fitted(float_denoiser, ALL, dataset)
    assert not any(module._forward_pre_hooks for module in float_denoiser.modules())


def test_progress_ends_where_it_says(float_denoiser: IndexedDenoiser, dataset: LatentDataset) -> None:
    transforms, told = transforms_of(float_denoiser, ALL), []
    transforms.apply(float_denoiser)
    transforms.fit(float_denoiser, dataset, lambda stage, done, total: told.append((stage, done, total)))
    calls = 2 * len(dataset.timestep_indices)  # either branch: no timestep has more than the 64
    assert ("ranges", calls, calls) in told
    assert told[-len(LINEARS) :] == [("low-rank branches", i + 1, len(LINEARS)) for i in range(len(LINEARS))]
