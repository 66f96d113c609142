from __future__ import annotations

import pytest
import torch

from s2p_deploy.calib import QuantizedDenoiser, plan_from_recipe
from s2p_deploy.calib.quantization.plan import mixed_plan
from s2p_deploy.calib.summary import average_bits
from s2p_deploy.families import HotDenoiser, discover_sites
from s2p_deploy.numerics import weight_scale_shape
from s2p_deploy.recipe import Mixed, Override, Recipe, recipe_from_data
from s2p_deploy.records import PrecisionPlan
from tests.calib.paper_layer_lists import (
    SD14,
    SD14_INSENSITIVE,
    SD14_SENSITIVE,
    SDXL,
    SDXL_INSENSITIVE,
    SDXL_SENSITIVE,
    expanded,
    meta_denoiser,
)

PAPER = {
    "sd14": (SD14, SD14_SENSITIVE, SD14_INSENSITIVE, 258),
    "sdxl": (SDXL, SDXL_SENSITIVE, SDXL_INSENSITIVE, 773),
}


@pytest.fixture(scope="module")
def sd14() -> HotDenoiser:
    return meta_denoiser(SD14)


def recipe(weights: str, rules: list[dict[str, str]]) -> Recipe:
    data = {
        "name": "paper",
        "weights": weights,
        "activations": "int8",
        "rules": rules,
        "dataset": {"prompts": 1, "points_per_prompt": 1},
        "training": {"iterations": 0},
    }
    return recipe_from_data(data, "test")


def paper_rules(sensitive_weights: str) -> list[dict[str, str]]:
    """The paper's W4 setting: sensitive layers W8A16, insensitive ones A4."""
    sensitive = [{"match": name, "weights": sensitive_weights, "activations": "none"} for name in SD14_SENSITIVE]
    return sensitive + [{"match": name, "activations": "int4"} for name in SD14_INSENSITIVE]


def on_meta(hot: HotDenoiser, plan: PrecisionPlan) -> QuantizedDenoiser:
    weights = {site.site: hot.network.get_submodule(site.site).weight for site in plan.sites}
    scales = {name: torch.ones(weight_scale_shape(weight), device="meta") for name, weight in weights.items()}
    return QuantizedDenoiser(hot, plan, scales)


def formats(plan: PrecisionPlan) -> dict[str, tuple[str, str]]:
    points = {point.name: point.activations for point in plan.act_points}
    return {site.site: (site.weights, points.get(site.act_point or "", "none")) for site in plan.sites}


def test_braces_expand_to_all_combinations() -> None:
    assert expanded("a{1,2}.to_{q,k}") == ["a1.to_q", "a1.to_k", "a2.to_q", "a2.to_k"]


@pytest.mark.parametrize("model", ["sd14", "sdxl"])
def test_every_listed_layer_is_a_site_and_either_list_is_five_percent(model: str) -> None:
    config, sensitive, insensitive, count = PAPER[model]
    sites = [site.name for site in discover_sites(meta_denoiser(config))]
    assert len(sites) == len(set(sites)) == count
    assert not set(sensitive) & set(insensitive)
    for listed in (sensitive, insensitive):
        assert len(listed) == len(set(listed)) == round(0.05 * count)
        assert set(listed) <= set(sites)


def test_the_paper_layers_as_rules_and_as_scores_give_one_plan(sd14: HotDenoiser) -> None:
    sites = discover_sites(sd14)
    by_rules = plan_from_recipe(recipe("int4", paper_rules("int8")), sites)
    scores = {site.name: 1.0 for site in sites}
    scores |= dict.fromkeys(SD14_SENSITIVE, 2.0) | dict.fromkeys(SD14_INSENSITIVE, 0.5)
    mixed = Mixed(sensitive=Override(weights="int8", activations="none"), insensitive=Override(activations="int4"))
    by_scores = mixed_plan(plan_from_recipe(recipe("int4", []), sites), sites, scores, mixed)
    assert formats(by_scores) == formats(by_rules)
    assert by_scores.act_points == by_rules.act_points
    assert {site.site for site in by_scores.sites if site.rule == "sensitive"} == set(SD14_SENSITIVE)
    assert {site.site for site in by_scores.sites if site.rule == "insensitive"} == set(SD14_INSENSITIVE)


def test_average_bits_of_the_paper_setting_depend_on_the_weighting() -> None:
    hot = meta_denoiser(SD14)
    plan = plan_from_recipe(recipe("int4", paper_rules("int8")), discover_sites(hot))
    bits = average_bits(on_meta(hot, plan), tokens=77)
    assert bits["parameters"]["weights"] == pytest.approx(4.007, abs=5e-4)  # the paper says 4.02
    assert bits["layers"] == pytest.approx({"weights": 4 + 4 * 13 / 258, "activations": 8 + (8 - 4) * 13 / 258})
    assert bits["input_elements"]["activations"] == pytest.approx(8.73, abs=5e-3)  # the paper says 8.35
    assert bits["floating_point"] == 16
