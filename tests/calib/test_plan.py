from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from s2p_deploy.calib import plan_from_recipe
from s2p_deploy.calib.plan import check_plan, mixed_plan
from s2p_deploy.errors import InputError
from s2p_deploy.families import IndexedDenoiser, QuantizableLayer, discover_layers, indexed_denoiser_of, load_pipeline
from s2p_deploy.recipe import Mixed, Override, Recipe, recipe_from_data
from s2p_deploy.records import PrecisionPlan
from tests.small_pipelines import sibling

# One attention block: q, k, v read tensor 1; the cross-attention's k and v read the text.
LAYERS = (
    QuantizableLayer("conv_in", "conv", 0, reads="sample"),
    QuantizableLayer("attn1.to_q", "linear", 1),
    QuantizableLayer("attn1.to_k", "linear", 1),
    QuantizableLayer("attn1.to_v", "linear", 1),
    QuantizableLayer("attn2.to_q", "linear", 2),
    QuantizableLayer("attn2.to_k", "linear", 3, reads="text"),
    QuantizableLayer("attn2.to_v", "linear", 3, reads="text"),
)


def recipe(weights: str = "int4", activations: str = "int8", *rules: dict[str, str]) -> Recipe:
    data = {
        "name": "test",
        "weights": weights,
        "activations": activations,
        "rules": list(rules),
        "dataset": {"prompts": 1, "samples_per_prompt": 1},
        "training": {"iterations": 0},
    }
    return recipe_from_data(data, "test")


def test_layers_that_read_one_tensor_share_the_point_of_the_first() -> None:
    plan = plan_from_recipe(recipe(), LAYERS)
    assert plan.quantizer_names() == ("conv_in", "attn1.to_q", "attn2.to_q", "attn2.to_k")
    assert plan.quantizer("attn1.to_q").layers == ("attn1.to_q", "attn1.to_k", "attn1.to_v")
    assert [layer.activation_quantizer for layer in plan.layers[1:4]] == ["attn1.to_q"] * 3


def test_a_second_format_on_a_tensor_is_a_second_point() -> None:
    plan = plan_from_recipe(recipe("int8", "int8", {"match": "attn1.to_k", "activations": "int4"}), LAYERS)
    assert plan.quantizer("attn1.to_q").layers == ("attn1.to_q", "attn1.to_v")
    assert plan.quantizer("attn1.to_k:int4").layers == ("attn1.to_k",)
    assert plan.quantizer("attn1.to_k:int4").activations == "int4"


def test_the_last_rule_that_names_a_field_decides_it() -> None:
    rules = (
        {"match": "attn*", "weights": "int8"},
        {"match": "*.to_k", "activations": "none"},
        {"match": "attn2.to_k", "weights": "int4"},
    )
    plan = plan_from_recipe(recipe("int4", "int8", *rules), LAYERS)
    found = {layer.name: (layer.weights, layer.activation_quantizer, layer.rule) for layer in plan.layers}
    assert found["conv_in"] == ("int4", "conv_in", "default")
    assert found["attn1.to_q"] == ("int8", "attn1.to_q", "attn*, default")
    assert found["attn1.to_k"] == ("int8", None, "attn*, *.to_k")
    assert found["attn2.to_k"] == ("int4", None, "attn2.to_k, *.to_k")


def test_text_matches_what_reads_only_the_text() -> None:
    plan = plan_from_recipe(recipe("int4", "int8", {"match": "text", "activations": "none"}), LAYERS)
    assert [layer.name for layer in plan.layers if layer.activation_quantizer is None] == ["attn2.to_k", "attn2.to_v"]


def test_input_and_output_match_the_first_and_the_last_layer() -> None:
    """Whatever they are called: ``proj_out`` is the last of a transformer and many inside a UNet."""
    layers = (
        QuantizableLayer("pos_embed.proj", "conv", 0, reads="sample"),
        QuantizableLayer("context_embedder", "linear", 1, reads="text"),
        QuantizableLayer("blocks.0.proj_out", "linear", 2),
        QuantizableLayer("proj_out", "linear", 3, last=True),
    )
    rules = ({"match": "input", "weights": "int8"}, {"match": "output", "activations": "none"})
    plan = plan_from_recipe(recipe("int4", "int8", *rules), layers)
    assert {layer.name: (layer.weights, layer.activation_quantizer is None) for layer in plan.layers} == {
        "pos_embed.proj": ("int8", False),
        "context_embedder": ("int4", False),
        "blocks.0.proj_out": ("int4", False),
        "proj_out": ("int4", True),
    }


def test_a_text_point_does_not_depend_on_the_timestep() -> None:
    plan = plan_from_recipe(recipe(), LAYERS)
    assert [quantizer.timestep_dependent for quantizer in plan.activation_quantizers] == [True, True, True, False]


def test_fp_plans_nothing() -> None:
    plan = plan_from_recipe(Recipe.load("fp"), LAYERS)
    assert plan.activation_quantizers == ()
    assert {layer.weights for layer in plan.layers} == {"none"}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"match": "mid_block.*", "weights": "int8"}, "'mid_block.*' matches no layer"),
        ({"match": "conv_in"}, "'conv_in' sets neither"),
        ({"match": "conv_in", "weights": "none"}, "conv_in would have int8 activations with floating-point weights"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_refused(rule: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message.replace("*", r"\*")):
        plan_from_recipe(recipe("int4", "int8", rule), LAYERS)


def test_the_preset_on_a_whole_denoiser(float_denoiser: IndexedDenoiser) -> None:
    plan = plan_from_recipe(Recipe.load("w4a8"), discover_layers(float_denoiser))
    assert Counter(layer.weights for layer in plan.layers) == {"int4": 71, "int8": 2}
    # 73 layers; no quantizer: conv_in, conv_out and k, v of 4 cross-attentions; q, k, v of 4 self-attentions share.
    assert len(plan.activation_quantizers) == 73 - 2 - 2 * 4 - 2 * 4
    assert {len(quantizer.layers) for quantizer in plan.activation_quantizers} == {1, 3}


@pytest.mark.parametrize(
    ("name", "edges"),
    [("sd2", ("conv_in", "conv_out")), ("sdxl", ("conv_in", "conv_out")), ("sd3", ("pos_embed.proj", "proj_out"))],
)
@pytest.mark.parametrize("preset", ["w8a8", "w4a8"])
def test_the_presets_on_the_other_families(name: str, edges: tuple[str, str], preset: str) -> None:
    layers = discover_layers(indexed_denoiser_of(load_pipeline(sibling(name)), 20))
    plan = plan_from_recipe(Recipe.load(preset), layers)
    found = {layer.name: layer for layer in plan.layers}
    assert (layers[0].name, layers[-1].name) == edges
    assert all((found[edge].weights, found[edge].activation_quantizer) == ("int8", None) for edge in edges)
    text = {layer.name for layer in layers if layer.reads == "text"}
    assert text
    assert {name for name, layer in found.items() if layer.activation_quantizer is None} == text | set(edges)
    assert {layer.weights for name, layer in found.items() if name not in edges} == {f"int{preset[1]}"}
    assert all(quantizer.timestep_dependent for quantizer in plan.activation_quantizers)


SCORES = {layer.name: float(place) for place, layer in enumerate(LAYERS)}  # conv_in least, attn2.to_v most
HALF = {"top": 0.25, "bottom": 0.25}  # of 7 layers: round(1.75) = 2 and 2


def mixed(sensitive: dict[str, str], insensitive: dict[str, str], **shares: float) -> Mixed:
    return Mixed(sensitive=Override(**sensitive), insensitive=Override(**insensitive), **(HALF | shares))


def formats(plan: PrecisionPlan) -> dict[str, tuple[str, str, str]]:
    quantizers = {quantizer.name: quantizer.activations for quantizer in plan.activation_quantizers}
    return {
        layer.name: (layer.weights, quantizers.get(layer.activation_quantizer or "", "none"), layer.rule)
        for layer in plan.layers
    }


def test_the_largest_and_smallest_scores_change_their_formats() -> None:
    plan = plan_from_recipe(recipe(), LAYERS)
    found = mixed_plan(plan, LAYERS, SCORES, mixed({"weights": "int8", "activations": "none"}, {"activations": "int4"}))
    assert formats(found) == {
        "conv_in": ("int4", "int4", "insensitive"),
        "attn1.to_q": ("int4", "int4", "insensitive"),
        "attn1.to_k": ("int4", "int8", "default"),
        "attn1.to_v": ("int4", "int8", "default"),
        "attn2.to_q": ("int4", "int8", "default"),
        "attn2.to_k": ("int8", "none", "sensitive"),
        "attn2.to_v": ("int8", "none", "sensitive"),
    }
    assert {layer.name: layer.sensitivity for layer in found.layers} == SCORES
    # to_q left the tensor's INT8 quantizer, whose first layer is to_k now
    assert found.quantizer("attn1.to_q").layers == ("attn1.to_q",)
    assert found.quantizer("attn1.to_k:int8").layers == ("attn1.to_k", "attn1.to_v")
    check_plan(found, LAYERS)


def test_null_keeps_what_the_rules_gave() -> None:
    plan = plan_from_recipe(recipe("int4", "int8", {"match": "text", "activations": "none"}), LAYERS)
    found = mixed_plan(plan, LAYERS, SCORES, mixed({"weights": "int8"}, {}))
    assert formats(found)["attn2.to_v"] == ("int8", "none", "sensitive")
    assert formats(found)["conv_in"] == ("int4", "int8", "insensitive")
    assert found.activation_quantizers == plan.activation_quantizers


def test_shares_are_of_the_layers_that_the_rules_quantize() -> None:
    off = {"match": "attn2.*", "weights": "none", "activations": "none"}
    plan = plan_from_recipe(recipe("int4", "int8", off), LAYERS)
    found = mixed_plan(plan, LAYERS, SCORES, mixed({"weights": "int8"}, {}))  # of 4 layers: 1 and 1
    assert [layer.name for layer in found.layers if layer.rule == "sensitive"] == ["attn1.to_v"]
    assert [layer.name for layer in found.layers if layer.rule == "insensitive"] == ["conv_in"]


def test_no_layer_is_both() -> None:
    found = mixed_plan(plan_from_recipe(recipe(), LAYERS), LAYERS, SCORES, mixed({}, {}, top=0.8, bottom=0.8))
    assert Counter(layer.rule for layer in found.layers) == {"sensitive": 6, "insensitive": 1}


def test_a_share_of_the_multiplications_goes_to_the_largest_scores_per_multiplication() -> None:
    plan = plan_from_recipe(recipe(), LAYERS)
    scores = dict.fromkeys(SCORES, 0.0) | {"conv_in": 8.0, "attn1.to_q": 6.0, "attn2.to_q": 1.0}
    products = dict.fromkeys(SCORES, 0.1) | {"conv_in": 0.4, "attn1.to_q": 0.2, "attn1.to_k": 0.02, "attn1.to_v": 0.02}

    def sensitive(share: float) -> set[str]:
        within = mixed({"activations": "none"}, {}, products=share)
        found = mixed_plan(plan, LAYERS, scores, within, products)
        return {layer.name for layer in found.layers if layer.rule == "sensitive"}

    of_attention = {"attn1.to_q", "attn1.to_k", "attn1.to_v"}  # read one tensor, so they go together: 6 / 0.24
    assert sensitive(0.25) == of_attention
    assert sensitive(0.63) == of_attention | {"attn2.to_q"}  # conv_in has too many, and what scores 0 gains nothing
    assert sensitive(0.65) == of_attention | {"conv_in"}


def test_mixed_precision_refuses_what_no_engine_can_do() -> None:
    plan = plan_from_recipe(recipe(), LAYERS)
    with pytest.raises(InputError, match=r"attn2\.to_k would have int8 activations with floating-point weights"):
        mixed_plan(plan, LAYERS, SCORES, mixed({"weights": "none"}, {}))
    with pytest.raises(InputError, match=r"conv_in has no sensitivity"):
        mixed_plan(plan, LAYERS, {}, mixed({}, {}))


def edited(plan: PrecisionPlan, **values: str) -> PrecisionPlan:
    """With other values of the first layer, conv_in."""
    return replace(plan, layers=(replace(plan.layers[0], **values), *plan.layers[1:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: edited(plan, name="conv_inn"), "the denoiser has no layer conv_inn"),
        (lambda plan: replace(plan, layers=plan.layers[1:]), "layer conv_in is missing"),
        (lambda plan: edited(plan, op="linear"), "layer conv_in is a conv, not a linear"),
        (lambda plan: edited(plan, weights="none"), "conv_in would have int8 activations"),
        (
            lambda plan: replace(
                plan, activation_quantizers=(replace(plan.activation_quantizers[0], layers=("conv_in", "attn1.to_q")),)
            ),
            "activation quantizer conv_in: conv_in, attn1.to_q do not read one tensor",
        ),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(change: Callable[[PrecisionPlan], PrecisionPlan], message: str) -> None:
    plan = plan_from_recipe(recipe(), LAYERS)
    check_plan(plan, LAYERS)
    with pytest.raises(InputError, match=message):
        check_plan(change(plan), LAYERS)
