from __future__ import annotations

from collections import Counter

import pytest

from s2p_deploy.calib import plan_from_recipe
from s2p_deploy.errors import InputError
from s2p_deploy.families import HotDenoiser, Site, discover_sites
from s2p_deploy.recipe import Recipe, load_recipe, recipe_from_data

# One attention block: q, k, v read tensor 1; the cross-attention's k and v read the text.
SITES = (
    Site("conv_in", "conv", 0, reads_text=False),
    Site("attn1.to_q", "linear", 1, reads_text=False),
    Site("attn1.to_k", "linear", 1, reads_text=False),
    Site("attn1.to_v", "linear", 1, reads_text=False),
    Site("attn2.to_q", "linear", 2, reads_text=False),
    Site("attn2.to_k", "linear", 3, reads_text=True),
    Site("attn2.to_v", "linear", 3, reads_text=True),
)


def recipe(weights: str = "int4", activations: str = "int8", *rules: dict[str, str]) -> Recipe:
    data = {
        "name": "test",
        "weights": weights,
        "activations": activations,
        "rules": list(rules),
        "dataset": {"prompts": 1, "points_per_prompt": 1},
        "training": {"iterations": 0},
    }
    return recipe_from_data(data, "test")


def test_sites_that_read_one_tensor_share_the_point_of_the_first() -> None:
    plan = plan_from_recipe(recipe(), SITES)
    assert plan.point_names() == ("conv_in", "attn1.to_q", "attn2.to_q", "attn2.to_k")
    assert plan.point("attn1.to_q").sites == ("attn1.to_q", "attn1.to_k", "attn1.to_v")
    assert [site.act_point for site in plan.sites[1:4]] == ["attn1.to_q"] * 3


def test_a_second_format_on_a_tensor_is_a_second_point() -> None:
    plan = plan_from_recipe(recipe("int8", "int8", {"match": "attn1.to_k", "activations": "int4"}), SITES)
    assert plan.point("attn1.to_q").sites == ("attn1.to_q", "attn1.to_v")
    assert plan.point("attn1.to_k:int4").sites == ("attn1.to_k",)
    assert plan.point("attn1.to_k:int4").activations == "int4"


def test_the_last_rule_that_names_a_field_decides_it() -> None:
    rules = (
        {"match": "attn*", "weights": "int8"},
        {"match": "*.to_k", "activations": "none"},
        {"match": "attn2.to_k", "weights": "int4"},
    )
    plan = plan_from_recipe(recipe("int4", "int8", *rules), SITES)
    found = {site.site: (site.weights, site.act_point, site.rule) for site in plan.sites}
    assert found["conv_in"] == ("int4", "conv_in", "default")
    assert found["attn1.to_q"] == ("int8", "attn1.to_q", "attn*, default")
    assert found["attn1.to_k"] == ("int8", None, "attn*, *.to_k")
    assert found["attn2.to_k"] == ("int4", None, "attn2.to_k, *.to_k")


def test_text_matches_what_reads_only_the_text() -> None:
    plan = plan_from_recipe(recipe("int4", "int8", {"match": "text", "activations": "none"}), SITES)
    assert [site.site for site in plan.sites if site.act_point is None] == ["attn2.to_k", "attn2.to_v"]


def test_a_text_point_does_not_depend_on_the_timestep() -> None:
    plan = plan_from_recipe(recipe(), SITES)
    assert [point.timestep_dependent for point in plan.act_points] == [True, True, True, False]


def test_fp_plans_nothing() -> None:
    plan = plan_from_recipe(load_recipe("fp"), SITES)
    assert plan.act_points == ()
    assert {site.weights for site in plan.sites} == {"none"}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"match": "mid_block.*", "weights": "int8"}, "'mid_block.*' matches no site"),
        ({"match": "conv_in"}, "'conv_in' sets neither"),
        ({"match": "conv_in", "weights": "none"}, "conv_in would have int8 activations with floating-point weights"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_refused(rule: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message.replace("*", r"\*")):
        plan_from_recipe(recipe("int4", "int8", rule), SITES)


def test_the_preset_on_a_whole_denoiser(hot: HotDenoiser) -> None:
    plan = plan_from_recipe(load_recipe("w4a8"), discover_sites(hot))
    assert Counter(site.weights for site in plan.sites) == {"int4": 71, "int8": 2}
    # 73 sites; without act point: conv_in, conv_out and k, v of 4 cross-attentions; q, k, v of 4 self-attentions share.
    assert len(plan.act_points) == 73 - 2 - 2 * 4 - 2 * 4
    assert {len(point.sites) for point in plan.act_points} == {1, 3}
