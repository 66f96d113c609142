from __future__ import annotations

from pathlib import Path

import pytest

from s2p_deploy.errors import InputError
from s2p_deploy.families import BasePipeline
from s2p_deploy.recipe import Recipe, preset_names
from s2p_research.calibrate import calibrate
from s2p_research.recipe import ResearchRecipe, is_product_recipe, recipe_names

BASELINES = {"bitsfusion", "collapse", "efficientdm", "max", "pcr", "ptq4dm", "q-diffusion", "svdquant"}
ABLATIONS = {
    "asymmetric",
    "asymmetric-trained",
    "blocks",
    "freeze-layers",
    "freeze-oscillation",
    "guided-loss",
    "no-training",
    "one-scale",
    "sampler-loss",
    "serial",
    "serial-base",
    "serial-parts",
    "time-quantized",
    "trajectory-loss",
    "uniform-loss",
    "untrained-max",
    "untrained-mean",
    "untrained-min",
    "untrained-peaks",
}


def changed_keys(recipe: ResearchRecipe, other: ResearchRecipe) -> set[str]:
    """Top-level keys in which two recipes differ, without their names."""
    return {key for key, value in recipe if key != "name" and value != getattr(other, key)}


def test_every_recipe_loads_under_its_own_name() -> None:
    assert recipe_names() == sorted(BASELINES | ABLATIONS | {"pcr-8", "w8a8-mse", "w8a8-peaks", "w8a8-relaxed"})
    assert not set(recipe_names()) & set(preset_names())
    assert [ResearchRecipe.load(name).name for name in recipe_names()] == recipe_names()


def test_the_products_recipes_say_the_same_here() -> None:
    for name in preset_names():
        product, here = Recipe.load(name), ResearchRecipe.load(name)
        assert here.not_deployable == ""
        found = here.model_dump()
        for section, values in product.model_dump().items():
            if isinstance(values, dict):
                assert values.items() <= found[section].items()
            else:
                assert found[section] == values


def test_baselines_and_ablations_are_s2p_but_for_what_they_compare() -> None:
    base = ResearchRecipe.load("s2p")
    allowed = {"transforms", "scales", "training", "mixed"}
    changes = {name: changed_keys(ResearchRecipe.load(name), base) for name in BASELINES | ABLATIONS}
    assert changes.pop("bitsfusion") == {"activations", "mixed", "training"}
    assert changes.pop("ptq4dm") == {"dataset", "scales", "training"}
    assert {name for name, keys in changes.items() if not keys or keys - allowed} == set()


def test_baselines_that_train_nothing() -> None:
    trained = {name for name in BASELINES if ResearchRecipe.load(name).training.iterations > 0}
    assert trained == {"efficientdm", "bitsfusion"}
    assert {ResearchRecipe.load(name).training.iterations for name in trained} == {
        ResearchRecipe.load("w4a8").training.iterations
    }


@pytest.mark.parametrize("name", sorted(BASELINES - {"bitsfusion"}))
def test_one_override_gives_a_baseline_of_int8_weights(name: str) -> None:
    changed = ResearchRecipe.load(name, {"weights": "int8"})
    assert changed_keys(changed, ResearchRecipe.load(name)) == {"weights"}
    assert {rule.weights for rule in changed.rules} == {"int8", None}


def test_what_no_engine_can_run() -> None:
    reasons = {name: ResearchRecipe.load(name).not_deployable for name in recipe_names()}
    assert {name: reason for name, reason in reasons.items() if reason} == {
        "asymmetric": "activations with zero points",
        "asymmetric-trained": "activations with zero points",
        "bitsfusion": "weights of 3, 5 or 9 levels",
        "pcr": "10-bit activations",
        "w8a8-relaxed": "10-bit activations",
        "svdquant": "low-rank branches",
    }


def test_the_product_knows_no_key_of_a_comparison() -> None:
    with pytest.raises(InputError, match=r"training\.order: there is no such key"):
        Recipe.load("w4a8", {"training": {"order": "serial"}})


def test_a_streamed_recipe_takes_no_key_of_a_comparison(base: BasePipeline, tmp_path: Path) -> None:
    assert is_product_recipe(ResearchRecipe.load("ptq-stream"))
    for change in ({"scales": {"zero_point": True}}, {"transforms": {"low_rank": 4}}, {"training": {"loss": "guided"}}):
        recipe = ResearchRecipe.load("ptq-stream", change)
        assert not is_product_recipe(recipe)
        with pytest.raises(InputError, match="measures no activation, which a comparison needs"):
            calibrate(base, recipe, None, tmp_path / "out")
