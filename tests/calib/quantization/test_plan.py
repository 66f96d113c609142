from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
from sibling_pipelines import sibling

from s2p_deploy.calib import plan_from_recipe
from s2p_deploy.calib.quantization.plan import check_plan, mixed_plan
from s2p_deploy.errors import InputError
from s2p_deploy.families import HotDenoiser, Site, discover_sites, hot_denoiser_of, load_pipeline
from s2p_deploy.recipe import Mixed, Override, Recipe, load_recipe, recipe_from_data
from s2p_deploy.records import PrecisionPlan

# One attention block: q, k, v read tensor 1; the cross-attention's k and v read the text.
SITES = (
    Site("conv_in", "conv", 0, reads="sample"),
    Site("attn1.to_q", "linear", 1),
    Site("attn1.to_k", "linear", 1),
    Site("attn1.to_v", "linear", 1),
    Site("attn2.to_q", "linear", 2),
    Site("attn2.to_k", "linear", 3, reads="text"),
    Site("attn2.to_v", "linear", 3, reads="text"),
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


def test_input_and_output_match_the_first_and_the_last_site() -> None:
    """Whatever they are called: ``proj_out`` is the last of a transformer and many inside a UNet."""
    sites = (
        Site("pos_embed.proj", "conv", 0, reads="sample"),
        Site("context_embedder", "linear", 1, reads="text"),
        Site("blocks.0.proj_out", "linear", 2),
        Site("proj_out", "linear", 3, last=True),
    )
    rules = ({"match": "input", "weights": "int8"}, {"match": "output", "activations": "none"})
    plan = plan_from_recipe(recipe("int4", "int8", *rules), sites)
    assert {site.site: (site.weights, site.act_point is None) for site in plan.sites} == {
        "pos_embed.proj": ("int8", False),
        "context_embedder": ("int4", False),
        "blocks.0.proj_out": ("int4", False),
        "proj_out": ("int4", True),
    }


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


@pytest.mark.parametrize(
    ("name", "edges"),
    [("sd2", ("conv_in", "conv_out")), ("sdxl", ("conv_in", "conv_out")), ("sd3", ("pos_embed.proj", "proj_out"))],
)
@pytest.mark.parametrize("preset", ["w8a8", "w4a8"])
def test_the_presets_on_the_other_families(name: str, edges: tuple[str, str], preset: str) -> None:
    sites = discover_sites(hot_denoiser_of(load_pipeline(sibling(name)), 20))
    plan = plan_from_recipe(load_recipe(preset), sites)
    found = {site.site: site for site in plan.sites}
    assert (sites[0].name, sites[-1].name) == edges
    assert all((found[edge].weights, found[edge].act_point) == ("int8", None) for edge in edges)
    text = {site.name for site in sites if site.reads == "text"}
    assert text
    assert {name for name, site in found.items() if site.act_point is None} == text | set(edges)
    assert {site.weights for name, site in found.items() if name not in edges} == {f"int{preset[1]}"}
    assert all(point.timestep_dependent for point in plan.act_points)


SCORES = {site.name: float(place) for place, site in enumerate(SITES)}  # conv_in least, attn2.to_v most
HALF = {"top": 0.25, "bottom": 0.25}  # of 7 sites: round(1.75) = 2 and 2


def mixed(sensitive: dict[str, str], insensitive: dict[str, str], **shares: float) -> Mixed:
    return Mixed(sensitive=Override(**sensitive), insensitive=Override(**insensitive), **(HALF | shares))


def formats(plan: PrecisionPlan) -> dict[str, tuple[str, str, str]]:
    points = {point.name: point.activations for point in plan.act_points}
    return {site.site: (site.weights, points.get(site.act_point or "", "none"), site.rule) for site in plan.sites}


def test_the_largest_and_smallest_scores_change_their_formats() -> None:
    plan = plan_from_recipe(recipe(), SITES)
    found = mixed_plan(plan, SITES, SCORES, mixed({"weights": "int8", "activations": "none"}, {"activations": "int4"}))
    assert formats(found) == {
        "conv_in": ("int4", "int4", "insensitive"),
        "attn1.to_q": ("int4", "int4", "insensitive"),
        "attn1.to_k": ("int4", "int8", "default"),
        "attn1.to_v": ("int4", "int8", "default"),
        "attn2.to_q": ("int4", "int8", "default"),
        "attn2.to_k": ("int8", "none", "sensitive"),
        "attn2.to_v": ("int8", "none", "sensitive"),
    }
    assert {site.site: site.sensitivity for site in found.sites} == SCORES
    # to_q left the tensor's INT8 point, whose first site is to_k now
    assert found.point("attn1.to_q").sites == ("attn1.to_q",)
    assert found.point("attn1.to_k:int8").sites == ("attn1.to_k", "attn1.to_v")
    check_plan(found, SITES)


def test_null_keeps_what_the_rules_gave() -> None:
    plan = plan_from_recipe(recipe("int4", "int8", {"match": "text", "activations": "none"}), SITES)
    found = mixed_plan(plan, SITES, SCORES, mixed({"weights": "int8"}, {}))
    assert formats(found)["attn2.to_v"] == ("int8", "none", "sensitive")
    assert formats(found)["conv_in"] == ("int4", "int8", "insensitive")
    assert found.act_points == plan.act_points


def test_shares_are_of_the_sites_that_the_rules_quantize() -> None:
    off = {"match": "attn2.*", "weights": "none", "activations": "none"}
    plan = plan_from_recipe(recipe("int4", "int8", off), SITES)
    found = mixed_plan(plan, SITES, SCORES, mixed({"weights": "int8"}, {}))  # of 4 sites: 1 and 1
    assert [site.site for site in found.sites if site.rule == "sensitive"] == ["attn1.to_v"]
    assert [site.site for site in found.sites if site.rule == "insensitive"] == ["conv_in"]


def test_no_site_is_both() -> None:
    found = mixed_plan(plan_from_recipe(recipe(), SITES), SITES, SCORES, mixed({}, {}, top=0.8, bottom=0.8))
    assert Counter(site.rule for site in found.sites) == {"sensitive": 6, "insensitive": 1}


def test_mixed_precision_refuses_what_no_engine_can_do() -> None:
    plan = plan_from_recipe(recipe(), SITES)
    with pytest.raises(InputError, match=r"attn2\.to_k would have int8 activations with floating-point weights"):
        mixed_plan(plan, SITES, SCORES, mixed({"weights": "none"}, {}))
    with pytest.raises(InputError, match=r"conv_in has no sensitivity"):
        mixed_plan(plan, SITES, {}, mixed({}, {}))


def test_a_low_rank_branch_stays_in_floating_point() -> None:
    sites = (*SITES, Site("attn1.to_out.down", "linear", 4, branch=True))
    plan = plan_from_recipe(recipe(), sites)
    assert formats(plan)["attn1.to_out.down"] == ("none", "none", "low-rank branch")
    quantized = replace(plan, sites=(*plan.sites[:-1], replace(plan.sites[-1], weights="int8")))
    with pytest.raises(InputError, match=r"attn1\.to_out\.down is half of a low-rank branch"):
        check_plan(quantized, sites)


def edited(plan: PrecisionPlan, **values: str) -> PrecisionPlan:
    """With other values of the first site, conv_in."""
    return replace(plan, sites=(replace(plan.sites[0], **values), *plan.sites[1:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: edited(plan, site="conv_inn"), "the denoiser has no site conv_inn"),
        (lambda plan: replace(plan, sites=plan.sites[1:]), "site conv_in is missing"),
        (lambda plan: edited(plan, op="linear"), "site conv_in is a conv, not a linear"),
        (lambda plan: edited(plan, weights="none"), "conv_in would have int8 activations"),
        (
            lambda plan: replace(plan, act_points=(replace(plan.act_points[0], sites=("conv_in", "attn1.to_q")),)),
            "act point conv_in: conv_in, attn1.to_q do not read one tensor",
        ),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(change: Callable[[PrecisionPlan], PrecisionPlan], message: str) -> None:
    plan = plan_from_recipe(recipe(), SITES)
    check_plan(plan, SITES)
    with pytest.raises(InputError, match=message):
        check_plan(change(plan), SITES)
