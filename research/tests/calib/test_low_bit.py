from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s2p_deploy.calib import plan_from_recipe
from s2p_deploy.calib.samples import draw_samples
from s2p_deploy.context import silent
from s2p_deploy.families import IndexedDenoiser, discover_layers
from s2p_deploy.numerics import (
    INT4,
    fake_quantize,
    format_by_name,
    least_squares_weight_scale,
)
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import LatentDataset, PrecisionPlan
from s2p_research.formats import LEVELS3, LEVELS5, LEVELS9, weight_format
from s2p_research.formats import LOW_BIT as CANDIDATES
from s2p_research.low_bit import choose_formats, low_bit_plan
from s2p_research.recipe import ResearchMixed

SCORES = ((9.0, 4.0, 1.0), (5.0, 2.0, 0.5), (30.0, 20.0, 10.0))


AVERAGE = 2.5


@pytest.fixture
def plan(float_denoiser: IndexedDenoiser, recipe: Recipe) -> PrecisionPlan:
    return plan_from_recipe(recipe, discover_layers(float_denoiser))


def average(formats: tuple[str, ...] | list[str], sizes: list[int]) -> float:
    bits = [math.log2({"levels3": 3, "levels5": 5, "levels9": 9, "int4": 16}[name]) for name in formats]
    return sum(b * n for b, n in zip(bits, sizes, strict=True)) / sum(sizes)


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (4.0, (INT4, INT4, INT4)),
        (3.9, (INT4, LEVELS9, INT4)),  # 3.72
        (3.5, (LEVELS9, LEVELS9, INT4)),  # 3.45
        (3.2, (LEVELS9, LEVELS5, INT4)),  # 3.16
        (2.7, (LEVELS5, LEVELS3, INT4)),  # 2.64: the threshold 4 gives 2.88
        (1.6, (LEVELS3, LEVELS3, LEVELS3)),
        (1.55, (LEVELS3, LEVELS3, LEVELS3)),  # as few as there are
    ],
)
def test_the_smallest_threshold_that_saves_enough(bits: float, expected: tuple[object, ...]) -> None:
    assert choose_formats(SCORES, (100, 100, 100), bits) == expected


@given(
    scores=st.lists(st.tuples(*(st.floats(0, 1e6) for _ in CANDIDATES)), min_size=1, max_size=12),
    bits=st.floats(1.5, 4),
    data=st.data(),
)
def test_never_more_bits_than_asked_where_there_are_fewer(
    scores: list[tuple[float, ...]], bits: float, data: st.DataObject
) -> None:
    sizes = data.draw(st.lists(st.integers(1, 10**6), min_size=len(scores), max_size=len(scores)))
    chosen = choose_formats(scores, sizes, bits)
    reached = average([fmt.name for fmt in chosen], sizes)
    assert reached <= max(bits, math.log2(3)) + 1e-9
    fewer = choose_formats(scores, sizes, 1.51)
    assert all(low.levels <= fmt.levels for low, fmt in zip(fewer, chosen, strict=True))


def test_the_cheapest_layers_lose_bits_until_the_average_is_met(
    float_denoiser: IndexedDenoiser, plan: PrecisionPlan, dataset: LatentDataset
) -> None:
    before = {name: value.clone() for name, value in float_denoiser.state_dict().items()}
    found = low_bit_plan(float_denoiser, plan, dataset, ResearchMixed(low_bit=AVERAGE, latents=2), silent)
    assert all(torch.equal(value, before[name]) for name, value in float_denoiser.state_dict().items()), (
        "left as it was"
    )
    assert found.activation_quantizers == plan.activation_quantizers
    pairs = list(zip(plan.layers, found.layers, strict=True))
    assert all(new.weights == old.weights for old, new in pairs), "a container of four bits"
    assert all(new == old for old, new in pairs if weight_format(new) == weight_format(old))
    changed = [new for old, new in pairs if new != old]
    assert {layer.rule.split(", ")[-1] for layer in changed} <= {"levels3", "levels5", "levels9"}
    chosen = [new for old, new in pairs if old.weights == "int4"]
    sizes = [float_denoiser.network.get_submodule(layer.name).weight.numel() for layer in chosen]
    assert AVERAGE - 0.1 < average([weight_format(layer).name for layer in chosen], sizes) <= AVERAGE
    scores: dict[bool, list[float]] = {True: [], False: []}
    for layer in chosen[:: len(chosen) // 12]:
        scores[weight_format(layer) == LEVELS3].append(three_level_score(float_denoiser, layer.name, dataset))
    assert max(scores[True]) < min(scores[False]), "one threshold on error times N^-0.3"


@torch.no_grad()
def three_level_score(float_denoiser: IndexedDenoiser, layer: str, dataset: LatentDataset) -> float:
    points = draw_samples(dataset, 2, 0)
    exact = float_denoiser(*points.inputs(torch.arange(4)))
    weight = float_denoiser.network.get_submodule(layer).weight
    kept = weight.clone()
    weight.copy_(fake_quantize(kept, least_squares_weight_scale(kept, LEVELS3), LEVELS3))
    error = (float_denoiser(*points.inputs(torch.arange(4))) - exact).square().mean()
    weight.copy_(kept)
    return float(error) * kept.numel() ** -0.3


def test_sensitive_layers_are_left_alone(
    float_denoiser: IndexedDenoiser, plan: PrecisionPlan, dataset: LatentDataset
) -> None:
    layers = tuple(replace(s, rule="insensitive" if s.name == "conv_out" else "sensitive") for s in plan.layers)
    found = low_bit_plan(
        float_denoiser, replace(plan, layers=layers), dataset, ResearchMixed(low_bit=1.6, latents=1), silent
    )
    assert found.layers[:-1] == layers[:-1]
    assert (found.layers[-1].weights, found.layers[-1].rule) == ("int4", "insensitive, levels3")


def test_no_average_no_change(float_denoiser: IndexedDenoiser, plan: PrecisionPlan, dataset: LatentDataset) -> None:
    assert low_bit_plan(float_denoiser, plan, dataset, ResearchMixed(), silent) is plan


def test_candidates_have_fewer_levels_than_int4() -> None:
    assert [fmt.levels for fmt in CANDIDATES] == [3, 5, 9]
    assert format_by_name("int4") is INT4
