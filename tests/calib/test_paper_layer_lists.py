from __future__ import annotations

import pytest
import torch

from s2p_deploy.calib import QuantizedDenoiser, plan_from_recipe
from s2p_deploy.calib.model_files import average_bits
from s2p_deploy.calib.plan import mixed_plan
from s2p_deploy.families import IndexedDenoiser, discover_layers
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
def sd14() -> IndexedDenoiser:
    return meta_denoiser(SD14)


def recipe(weights: str, rules: list[dict[str, str]]) -> Recipe:
    data = {
        "name": "paper",
        "weights": weights,
        "activations": "int8",
        "rules": rules,
        "dataset": {"prompts": 1, "samples_per_prompt": 1},
        "training": {"iterations": 0},
    }
    return recipe_from_data(data, "test")


def paper_rules(sensitive_weights: str) -> list[dict[str, str]]:
    """The paper's W4 setting: sensitive layers W8A16, insensitive ones A4."""
    sensitive = [{"match": name, "weights": sensitive_weights, "activations": "none"} for name in SD14_SENSITIVE]
    return sensitive + [{"match": name, "activations": "int4"} for name in SD14_INSENSITIVE]


def on_meta(float_denoiser: IndexedDenoiser, plan: PrecisionPlan) -> QuantizedDenoiser:
    weights = {layer.name: float_denoiser.network.get_submodule(layer.name).weight for layer in plan.layers}
    scales = {name: torch.ones(weight_scale_shape(weight), device="meta") for name, weight in weights.items()}
    return QuantizedDenoiser(float_denoiser, plan, scales)


def formats(plan: PrecisionPlan) -> dict[str, tuple[str, str]]:
    points = {point.name: point.activations for point in plan.activation_quantizers}
    return {layer.name: (layer.weights, points.get(layer.activation_quantizer or "", "none")) for layer in plan.layers}


def test_braces_expand_to_all_combinations() -> None:
    assert expanded("a{1,2}.to_{q,k}") == ["a1.to_q", "a1.to_k", "a2.to_q", "a2.to_k"]


@pytest.mark.parametrize("model", ["sd14", "sdxl"])
def test_every_listed_layer_is_a_layer_and_either_list_is_five_percent(model: str) -> None:
    config, sensitive, insensitive, count = PAPER[model]
    layers = [layer.name for layer in discover_layers(meta_denoiser(config))]
    assert len(layers) == len(set(layers)) == count
    assert not set(sensitive) & set(insensitive)
    for listed in (sensitive, insensitive):
        assert len(listed) == len(set(listed)) == round(0.05 * count)
        assert set(listed) <= set(layers)


def test_the_paper_layers_as_rules_and_as_scores_give_one_plan(sd14: IndexedDenoiser) -> None:
    layers = discover_layers(sd14)
    by_rules = plan_from_recipe(recipe("int4", paper_rules("int8")), layers)
    scores = {layer.name: 1.0 for layer in layers}
    scores |= dict.fromkeys(SD14_SENSITIVE, 2.0) | dict.fromkeys(SD14_INSENSITIVE, 0.5)
    mixed = Mixed(sensitive=Override(weights="int8", activations="none"), insensitive=Override(activations="int4"))
    by_scores = mixed_plan(plan_from_recipe(recipe("int4", []), layers), layers, scores, mixed)
    assert formats(by_scores) == formats(by_rules)
    assert by_scores.activation_quantizers == by_rules.activation_quantizers
    assert {layer.name for layer in by_scores.layers if layer.rule == "sensitive"} == set(SD14_SENSITIVE)
    assert {layer.name for layer in by_scores.layers if layer.rule == "insensitive"} == set(SD14_INSENSITIVE)


def test_average_bits_of_the_paper_setting_depend_on_the_weighting() -> None:
    float_denoiser = meta_denoiser(SD14)
    plan = plan_from_recipe(recipe("int4", paper_rules("int8")), discover_layers(float_denoiser))
    bits = average_bits(on_meta(float_denoiser, plan), tokens=77)
    assert bits["parameters"]["weights"] == pytest.approx(4.007, abs=5e-4)  # the paper says 4.02
    assert bits["layers"] == pytest.approx({"weights": 4 + 4 * 13 / 258, "activations": 8 + (8 - 4) * 13 / 258})
    assert bits["input_elements"]["activations"] == pytest.approx(8.73, abs=5e-3)  # the paper says 8.35
    assert bits["floating_point"] == 16
