"""benchmarks/engines/target.py: what its search may see, and the plan that a recipe of INT4 weights takes over."""

from __future__ import annotations

from benchmarks.engines.target import SEARCH_PROMPTS, TARGET, narrowed, prompts_of_search
from s2p_deploy.api import as_prompts
from s2p_deploy.calib.target import target_prompts
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import ActivationQuantizer, LayerPlan, PrecisionPlan
from s2p_deploy.shapes.scenes import is_held_out, parse


def test_a_search_sees_half_unseen_combinations_and_no_held_out_prompt() -> None:
    found = prompts_of_search(256)
    assert found.prompts[:256] == as_prompts("shapes:train").prompts[:256]
    search = found.prompts[256:]
    assert len(search) == len({prompt.text for prompt in search}) == SEARCH_PROMPTS
    known = {prompt.text for name in ("train", "held_out") for prompt in as_prompts(f"shapes:{name}").prompts}
    assert not known & {prompt.text for prompt in search}
    unseen = [any(is_held_out(item) for item in parse(prompt.text).objects) for prompt in search]
    assert abs(sum(unseen) - SEARCH_PROMPTS / 2) < 10  # those of the files are left out of both halves


def test_the_prompts_are_as_many_as_the_search_takes() -> None:
    recipe = Recipe.load("w8a8", {"target": TARGET | {"psnr": 50.0}})
    assert len(target_prompts(recipe, prompts_of_search(recipe.dataset.prompts)).prompts) == SEARCH_PROMPTS


def test_a_narrowed_plan_keeps_activations_and_the_ends() -> None:
    layers = (
        LayerPlan("conv_in", "conv", "int8", None, "input"),
        LayerPlan("a", "linear", "int8", "a", "default"),
        LayerPlan("b", "linear", "int8", None, "target"),
    )
    found = narrowed(PrecisionPlan(layers, (ActivationQuantizer("a", "int8", ("a",)),)), "int4")
    assert [layer.weights for layer in found.layers] == ["int8", "int4", "int4"]
    assert [layer.activation_quantizer for layer in found.layers] == [None, "a", None]
