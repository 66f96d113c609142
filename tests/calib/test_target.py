"""A target of fidelity: what each quantizer does to the pictures, in which order they go, and when it is enough."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from s2p_deploy.calib import QuantizedConv2d, calibrate, dataset_request, fake_quant_denoiser, generate_dataset
from s2p_deploy.calib.hooks import PRODUCT
from s2p_deploy.calib.picture_error import Drawing, Relief, alone, error_alone, reliefs, relieved, with_plan
from s2p_deploy.calib.request import CalibrationRequest
from s2p_deploy.calib.target import (
    Ranking,
    Reached,
    costs_by_products,
    fewest,
    ordered,
    rank_by_picture,
    reach_target,
    shares_of_products,
    target_prompts,
    with_errors,
)
from s2p_deploy.calib.training_state import TrainingState
from s2p_deploy.calib.trajectories import FloatPipeline, final_latents, load_float_pipeline, trajectory_inputs
from s2p_deploy.context import Context
from s2p_deploy.errors import GateFailedError, InputError
from s2p_deploy.families import (
    BasePipeline,
    IndexedDenoiser,
    indexed_denoiser_of,
    load_pipeline,
    resolve_base,
    text_tokens,
    zero_inputs,
)
from s2p_deploy.families.pictures import latent_pictures
from s2p_deploy.metric_networks import LPIPS, open_weights
from s2p_deploy.metrics import psnr_db
from s2p_deploy.pipeline import Schedule
from s2p_deploy.recipe import Recipe, recipe_from_data
from s2p_deploy.records import Prompt, PromptSet
from s2p_deploy.records.precision_plan import read_plan, write_plan
from s2p_deploy.validation.pictures import generate_pictures
from tests.small_pipelines import sibling
from tests.training_states import new_state
from tests.validation.networks import write_weights

TARGET = {"psnr": 30.0, "ranked": 2, "searched": 3, "verified": 2}


@pytest.fixture(scope="module")
def few_layers() -> Recipe:
    """W4A8 of a few layers, the rest in floating point: a search draws with every quantizer by itself."""
    data = {
        "name": "tiny",
        "weights": "none",
        "activations": "none",
        "rules": [
            {"match": "down_blocks.0.resnets.0.*", "weights": "int4", "activations": "int8"},
            {"match": "*down_blocks.0*.attn1.*", "weights": "int4", "activations": "int8"},
            {"match": "*down_blocks.0*.attn2.to_k", "weights": "int4"},
            {"match": "conv_in", "weights": "int8"},
        ],
        "sampling": {"steps": 3, "guidance_scale": 2.5},
        "dataset": {"prompts": 6, "samples_per_prompt": 3, "width": 2, "prompts_per_shard": 2},
        "training": {"iterations": 2, "batch": 4, "save_minutes": 0},
        "scales": {"latents": 8},
    }
    return recipe_from_data(data, "test")


@pytest.fixture(scope="module")
def few_source(base: BasePipeline, few_layers: Recipe) -> FloatPipeline:
    """Not for tests that change its denoiser."""
    return load_float_pipeline(base, few_layers.sampling.steps)


@pytest.fixture(scope="module")
def few_untrained(
    base: BasePipeline, few_layers: Recipe, prompts: PromptSet, tmp_path_factory: pytest.TempPathFactory
) -> TrainingState:
    folder = tmp_path_factory.mktemp("few") / "dataset"
    return new_state(base, few_layers, generate_dataset(dataset_request(base, few_layers, prompts, folder)))


@pytest.fixture
def few_state(few_untrained: TrainingState) -> TrainingState:
    return copy.deepcopy(few_untrained)


@pytest.fixture(scope="module")
def judged() -> PromptSet:
    return PromptSet(tuple(Prompt(f"j{number}", f"a red circle, {number}") for number in range(5)))


def new_request(
    base: BasePipeline, recipe: Recipe, prompts: PromptSet, judged: PromptSet, out: Path
) -> CalibrationRequest:
    asked = recipe_from_data(recipe.model_dump() | {"target": TARGET}, "test")
    request = CalibrationRequest(
        base, asked, prompts, PromptSet(()), judged, out, None, None, None, False, PRODUCT, Context()
    )
    request.partial.mkdir()
    return request


@pytest.fixture(scope="module")
def ranked(  # noqa: PLR0917 - fixtures
    base: BasePipeline,
    few_layers: Recipe,
    prompts: PromptSet,
    judged: PromptSet,
    few_source: FloatPipeline,
    few_untrained: TrainingState,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Ranking]:
    """The work folder of a ranking, and the ranking."""
    request = new_request(base, few_layers, prompts, judged, tmp_path_factory.mktemp("ranked") / "model")
    return request.partial, rank_by_picture(request, few_source, few_untrained, TARGET["ranked"])


@pytest.fixture
def request_of(
    base: BasePipeline,
    few_layers: Recipe,
    prompts: PromptSet,
    judged: PromptSet,
    ranked: tuple[Path, Ranking],
    tmp_path: Path,
) -> CalibrationRequest:
    """A request whose quantizers were ranked."""
    request = new_request(base, few_layers, prompts, judged, tmp_path / "model")
    shutil.copytree(ranked[0], request.partial, dirs_exist_ok=True)
    return request


def asking(request: CalibrationRequest, **limits: object) -> CalibrationRequest:
    target = request.recipe.target.model_copy(update=limits)
    return replace(request, recipe=request.recipe.model_copy(update={"target": target}))


@pytest.mark.parametrize("name", ["shapes", "sd2", "sdxl", "sd3"])
def test_a_search_draws_the_pipelines_own_pictures(name: str) -> None:
    base = resolve_base("shapes") if name == "shapes" else sibling(name)
    sampling = {"steps": 3, "guidance_scale": 2.0, "max_sequence_length": 4}
    recipe = Recipe.load("w8a8", {"sampling": sampling})
    prompts = PromptSet((Prompt("a", "a large red circle"), Prompt("b", "a small blue square")))
    schedule = Schedule(3, max_sequence_length=4)
    expected = generate_pictures(load_pipeline(base), prompts, schedule, 2.0).pictures
    floating = load_float_pipeline(base, 3)
    latents = final_latents(floating.denoiser, trajectory_inputs(floating, prompts, recipe))
    found = latent_pictures(floating.pipe, latents).permute(0, 2, 3, 1).numpy()
    assert np.abs(found - expected).max() < 1e-4


def test_reliefs_are_activations_and_four_bit_weights(few_state: TrainingState) -> None:
    plan = few_state.denoiser.plan
    found = reliefs(plan)
    four_bit = [layer.name for layer in plan.layers if layer.weights == "int4"]
    assert [each.name for each in found if each.kind == "activations"] == list(plan.quantizer_names())
    assert [each.name for each in found if each.kind == "weights"] == four_bit
    assert len({each.key for each in found}) == len(found)


def test_all_reliefs_leave_eight_bit_weights_alone(few_state: TrainingState) -> None:
    plan = relieved(few_state.denoiser.plan, reliefs(few_state.denoiser.plan))
    assert plan.activation_quantizers == ()
    assert {layer.weights for layer in plan.layers} == {"int8", "none"}
    assert {layer.activation_quantizer for layer in plan.layers} == {None}


def test_one_relief_changes_its_layers_alone(few_state: TrainingState) -> None:
    plan = few_state.denoiser.plan
    one = next(each for each in reliefs(plan) if len(each.layers) > 1)
    found = relieved(plan, [one])
    changed = [new.name for new, old in zip(found.layers, plan.layers, strict=True) if new != old]
    assert tuple(changed) == one.layers
    assert one.name not in found.quantizer_names()


def test_a_quantizer_alone_quantizes_nothing_else(
    few_state: TrainingState, few_source: FloatPipeline, request_of: CalibrationRequest
) -> None:
    plan = few_state.denoiser.plan
    none = with_plan(few_state, alone(plan, None), request_of)
    inputs = zero_inputs(few_source.denoiser, tokens=text_tokens(few_source.pipe, 77), batch=2)
    sample = torch.randn(inputs.sample.shape, generator=torch.Generator().manual_seed(0))
    index = few_state.calibrated[:1].repeat(2)
    text = torch.randn(inputs.encoder_hidden_states.shape, generator=torch.Generator().manual_seed(1))
    arguments = (sample, index, text, inputs.added_cond)
    with torch.no_grad():
        assert torch.equal(none.predict(*arguments), few_source.denoiser(*arguments))
        for one in reliefs(plan)[:1] + reliefs(plan)[-1:]:
            only = with_plan(few_state, alone(plan, one), request_of)
            assert not torch.equal(only.predict(*arguments), few_source.denoiser(*arguments))
    quantizers = [module for module in only.denoiser.modules() if isinstance(module, QuantizedConv2d)]
    assert quantizers


def test_another_plan_shares_the_tensors_and_changes_none(
    few_state: TrainingState, request_of: CalibrationRequest
) -> None:
    before = {name: value.clone() for name, value in few_state.denoiser.inner.state_dict().items()}
    plan = few_state.denoiser.plan
    made = with_plan(few_state, relieved(plan, reliefs(plan)[:2]), request_of, bake=False)
    name = f"{plan.layers[1].name}.weight"
    assert made.denoiser.inner.network.get_parameter(name) is few_state.denoiser.inner.network.get_parameter(name)
    with_plan(few_state, relieved(plan, reliefs(plan)), request_of)
    assert all(torch.equal(value, before[name]) for name, value in few_state.denoiser.inner.state_dict().items())


def test_weights_that_stay_as_they_were_keep_their_scales(
    few_state: TrainingState, request_of: CalibrationRequest
) -> None:
    plan = few_state.denoiser.plan
    wide = next(each for each in reliefs(plan) if each.kind == "weights")
    made = with_plan(few_state, relieved(plan, [wide]), request_of, bake=False)
    before, after = few_state.denoiser.weight_scales(), made.denoiser.weight_scales()
    for name, scale in before.items():
        if name == wide.name:  # a finer grid
            assert (after[name] < scale / 4).all()
        else:
            assert torch.allclose(after[name], scale, rtol=1e-6)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_orders_by_gain_over_cost(count: int) -> None:
    errors = {"a": np.array([4.0, 4.0]), "b": np.array([2.0, 2.0]), "c": np.array([1.0, 1.0])}
    floor = np.array([0.1, 0.1])
    by_gain = ordered(errors, floor, dict.fromkeys(errors, 1.0))
    assert by_gain == ["a", "b", "c"]
    dear = dict.fromkeys(errors, 1.0) | {"abc"[count]: 1e6}
    assert ordered(errors, floor, dear)[-1] == "abc"[count]


def test_a_gain_counts_what_is_left() -> None:
    # x is 9 of 10 parts in one picture and nothing in the other; y and z are half of the rest each
    errors = {"x": np.array([9.0, 0.0]), "y": np.array([0.5, 0.5]), "z": np.array([0.5, 0.5])}
    floor = np.array([1e-3, 1e-3])
    assert ordered(errors, floor, dict.fromkeys(errors, 1.0))[0] == "x"
    assert ordered(errors, floor, {"x": 10.0, "y": 1.0, "z": 1.0})[0] in {"y", "z"}


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=8), st.floats(1e-6, 1))
def test_every_quantizer_is_ordered_once(errors: list[list[float]], floor: float) -> None:
    ranking = {str(number): np.array(values) for number, values in enumerate(errors)}
    order = ordered(ranking, np.full(3, floor), dict.fromkeys(ranking, 0.1))
    assert sorted(order) == sorted(ranking)


@given(st.integers(0, 70), st.data())
def test_the_fewest_are_found_sooner_from_nearby(most: int, data: st.DataObject) -> None:
    needed, start = data.draw(st.integers(0, most + 1)), data.draw(st.integers(0, most))
    asked: list[int] = []

    def enough(count: int) -> bool:
        asked.append(count)
        return count >= needed

    assert fewest(enough, most, start) == (needed if needed <= most else None)
    assert len(set(asked)) == len(asked)
    assert all(0 <= count <= most for count in asked)
    if start == needed:
        assert len(asked) <= 2
    assert len(asked) <= 2 * (most + 2).bit_length()


def test_costs_are_shares_of_the_multiplications(few_state: TrainingState, float_denoiser: IndexedDenoiser) -> None:
    costs = costs_by_products(float_denoiser, few_state.denoiser.plan, tokens=8)
    activations = [each for each in reliefs(few_state.denoiser.plan) if each.kind == "activations"]
    assert all(costs.products[each.key] > 0 for each in activations)
    assert sum(costs.products[each.key] for each in activations) < 1  # attention and the others have the rest
    conv = next(each for each in activations if "resnets.0.conv1" in each.name)
    linear = next(each for each in activations if each.name.endswith("to_out.0"))
    assert costs.of[conv.key] > costs.of[linear.key] > 0


def test_a_convolutions_share_is_by_its_weights(few_state: TrainingState, float_denoiser: IndexedDenoiser) -> None:
    costs = costs_by_products(float_denoiser, few_state.denoiser.plan, tokens=8)
    activations = {each.name: each for each in reliefs(few_state.denoiser.plan) if each.kind == "activations"}
    found = {}
    for name in ("down_blocks.0.resnets.0.conv1", "down_blocks.0.resnets.0.conv2"):
        weight = few_state.denoiser.layer(name).get_parameter("weight")
        found[name] = costs.products[activations[name].key] / weight.numel()  # at one size of the picture
    first, second = found.values()
    assert first == pytest.approx(second)


def test_the_ranking_has_every_quantizer(few_state: TrainingState, ranked: tuple[Path, Ranking]) -> None:
    ranking = ranked[1]
    assert set(ranking.errors) == {each.key for each in reliefs(few_state.denoiser.plan)}
    assert all(len(errors) == 2 and (errors >= 0).all() for errors in ranking.errors.values())
    assert len(ranking.drawn["latents"]) == 5


def test_the_ranking_is_kept_and_goes_on(
    few_state: TrainingState,
    few_source: FloatPipeline,
    request_of: CalibrationRequest,
    ranked: tuple[Path, Ranking],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = request_of.partial / "target_picture_errors.json"
    kept = json.loads(file.read_text())
    key, errors = kept.popitem()
    file.write_text(json.dumps(kept))
    drawn = []

    def draw(_state: TrainingState, one: Relief, drawing: Drawing, request: CalibrationRequest) -> NDArray[np.float64]:
        drawn.append(one.key)
        return error_alone(_state, one, drawing, request)

    monkeypatch.setattr("s2p_deploy.calib.target.error_alone", draw)
    again = rank_by_picture(request_of, few_source, few_state, 2)
    assert drawn == [key]
    assert again.errors[key].tolist() == errors
    assert torch.equal(again.drawn["latents"], ranked[1].drawn["latents"])


def test_a_layers_error_is_of_its_input_and_its_weights(few_state: TrainingState, tmp_path: Path) -> None:
    plan = few_state.denoiser.plan
    errors = {each.key: np.array([1.0, 3.0]) for each in reliefs(plan)}
    scored = with_errors(plan, Ranking(errors, {}))
    by_name = {layer.name: layer for layer in scored.layers}
    both = next(layer for layer in plan.layers if layer.weights == "int4" and layer.activation_quantizer)
    weights_only = next(layer for layer in plan.layers if layer.weights == "int4" and not layer.activation_quantizer)
    assert by_name[both.name].picture_error == 4.0
    assert by_name[weights_only.name].picture_error == 2.0
    write_plan(scored, tmp_path / "plan.yaml")
    assert read_plan(tmp_path / "plan.yaml") == scored


def search(request: CalibrationRequest, source: FloatPipeline, state: TrainingState) -> tuple[TrainingState, Reached]:
    ranking = rank_by_picture(request, source, state, request.recipe.target.ranked)
    return reach_target(request, source, state, ranking)


def test_a_target_that_spares_layers_counts_them(
    few_state: TrainingState, few_source: FloatPipeline, request_of: CalibrationRequest
) -> None:
    plan = few_state.denoiser.plan
    by_key = {each.key: each for each in reliefs(plan)}
    costs = costs_by_products(few_source.denoiser, plan, tokens=8)
    target = request_of.recipe.target
    assert costs.spared(target, by_key) == costs.of
    counted = costs.spared(target.model_copy(update={"cost": "layers"}), by_key)
    assert set(counted) == set(by_key)
    assert counted == {key: len(each.layers) for key, each in by_key.items()}
    assert max(counted.values()) > 1  # queries, keys and values read one tensor


def test_what_holds_already_costs_nothing(
    few_state: TrainingState, few_source: FloatPipeline, request_of: CalibrationRequest
) -> None:
    found, reached = search(asking(request_of, psnr=0.5), few_source, few_state)
    assert reached.relieved == ()
    assert reached.step == 1.0
    assert found.denoiser.plan == few_state.denoiser.plan
    assert torch.allclose(found.act_scales.table(), few_state.act_scales.table(), rtol=1e-6)


def test_a_target_is_reached_and_verified_on_other_prompts(
    few_state: TrainingState, few_source: FloatPipeline, request_of: CalibrationRequest
) -> None:
    drawing = Drawing.of(
        few_source, request_of.judged, request_of, rank_by_picture(request_of, few_source, few_state, 2).drawn
    )
    plan = few_state.denoiser.plan
    least, most = (
        drawing.metric(with_plan(few_state, relieved(plan, given), request_of).predict, psnr_db)[0]
        for given in ((), reliefs(plan))
    )
    wanted = float(least.max() + most.min()) / 2
    assert least.max() < wanted < most.min()
    asked = asking(request_of, psnr=wanted, at="worst")
    found, reached = search(asked, few_source, few_state)
    assert 0 < len(reached.relieved) <= len(reliefs(plan))
    assert reached.prompts == 2
    assert reached.statistics["psnr"]["worst"] >= wanted
    verified = drawing[3:5].metric(found.predict, psnr_db)[0]
    assert reached.statistics["psnr"]["worst"] == pytest.approx(verified.min(), abs=0.2)  # weights are not baked here
    assert str(reached).endswith("×")
    dropped = {name for name in plan.quantizer_names() if name not in found.denoiser.plan.quantizer_names()}
    assert {f"activations {name}" for name in dropped} == {
        key for key in reached.relieved if key.startswith("activations")
    }


def test_fewer_are_relieved_where_less_is_asked(
    few_state: TrainingState, few_source: FloatPipeline, request_of: CalibrationRequest
) -> None:
    ranking = rank_by_picture(request_of, few_source, few_state, 2)
    counts = []
    for psnr in (5.0, 15.0, 20.0):
        try:
            counts.append(len(reach_target(asking(request_of, psnr=psnr), few_source, few_state, ranking)[1].relieved))
        except GateFailedError:
            counts.append(10**6)
    assert counts == sorted(counts)


def test_refuses_what_no_plan_reaches(
    few_state: TrainingState, few_source: FloatPipeline, request_of: CalibrationRequest
) -> None:
    with pytest.raises(GateFailedError, match=r"target of PSNR 99\.9 dB at the median cannot be reached: with every"):
        search(asking(request_of, psnr=99.9), few_source, few_state)


def test_says_where_other_prompts_do_not_agree(
    few_state: TrainingState, few_source: FloatPipeline, request_of: CalibrationRequest
) -> None:
    ranking = rank_by_picture(request_of, few_source, few_state, 2)
    far = ranking.drawn["latents"].clone()
    far[3:] = 20 * torch.randn(far[3:].shape, generator=torch.Generator().manual_seed(0))  # of the verifying prompts
    with pytest.raises(GateFailedError, match=r"was reached on 3 prompts and not on 2 others"):
        reach_target(asking(request_of, psnr=18.0), few_source, few_state, replace(ranking, drawn={"latents": far}))


@pytest.mark.parametrize(("given", "enough"), [(9, False), (12, True)])
def test_prompts_of_a_target_follow_those_that_calibrate(few_layers: Recipe, given: int, enough: bool) -> None:
    asked = recipe_from_data(few_layers.model_dump() | {"target": TARGET}, "test")
    prompts = PromptSet(tuple(Prompt(str(number), f"text {number}") for number in range(given)))
    if not enough:
        with pytest.raises(InputError, match=r"draws 5 prompts behind the 6 that calibrate, of 9"):
            target_prompts(asked, prompts)
        return
    assert [prompt.id for prompt in target_prompts(asked, prompts).prompts] == ["6", "7", "8", "9", "10", "11"]
    assert target_prompts(few_layers, prompts).prompts == ()


def test_a_calibration_with_a_target_can_be_deployed_and_goes_on_with_another(
    base: BasePipeline, prompts: PromptSet, few_layers: Recipe, judged: PromptSet, tmp_path: Path
) -> None:
    texts, out = PromptSet((*prompts.prompts, *judged.prompts)), tmp_path / "model"

    def with_target(psnr: float) -> Recipe:
        return recipe_from_data(few_layers.model_dump() | {"target": TARGET | {"psnr": psnr}}, "test")

    with pytest.raises(GateFailedError, match="cannot be reached"):
        calibrate(base, with_target(99.9), texts, out)
    kept = (out.parent / "model.partial" / "target_picture_errors.json").read_bytes()
    model = calibrate(base, with_target(1.0), texts, out)
    assert kept
    assert model.manifest.content["target"]["prompts"] == 2
    assert model.manifest.recipe["validation"]["gates"]["median_psnr"] == 1.0
    assert all(layer.picture_error is not None for layer in model.plan.layers)
    assert calibrate(base, with_target(1.0), texts, out).manifest.digest == model.manifest.digest
    fake_quant_denoiser(model)
    with pytest.raises(InputError, match="another request"):
        calibrate(base, with_target(2.0), texts, out)


def test_a_streamed_recipe_has_no_target(base: BasePipeline, tmp_path: Path) -> None:
    recipe = Recipe.load("ptq-stream", {"target": {"psnr": 40}})
    with pytest.raises(InputError, match="draws no pictures, so it has no target"):
        calibrate(base, recipe, None, tmp_path / "model")


def test_mixed_precision_by_picture_scores_every_layer(
    base: BasePipeline, prompts: PromptSet, few_layers: Recipe, judged: PromptSet, tmp_path: Path
) -> None:
    mixed = {"sensitivity": "pictures", "prompts": 2, "top": 0.1, "bottom": 0, "sensitive": {"weights": "int8"}}
    data = few_layers.model_dump() | {"mixed": mixed, "training": {"iterations": 0}}
    texts = PromptSet((*prompts.prompts, *judged.prompts))
    model = calibrate(base, recipe_from_data(data, "test"), texts, tmp_path / "model")
    scores = {layer.name: layer.sensitivity for layer in model.plan.layers}
    assert all(score is not None and score >= 0 for score in scores.values())
    ranked = sorted(scores, key=lambda name: -(scores[name] or 0))
    sensitive = [layer.name for layer in model.plan.layers if layer.rule == "sensitive"]
    assert ranked[0] in sensitive


def test_mixed_precision_stays_within_a_share_of_the_multiplications(
    base: BasePipeline, prompts: PromptSet, few_layers: Recipe, judged: PromptSet, tmp_path: Path
) -> None:
    mixed = {
        "sensitivity": "pictures",
        "prompts": 1,
        "products": 0.3,
        "bottom": 0,
        "sensitive": {"activations": "none"},
    }
    data = few_layers.model_dump() | {"mixed": mixed, "training": {"iterations": 0}}
    texts = PromptSet((*prompts.prompts, *judged.prompts))
    model = calibrate(base, recipe_from_data(data, "test"), texts, tmp_path / "model")
    products = shares_of_products(indexed_denoiser_of(load_pipeline(base), 5), model.plan, model.tokens)
    wide = [layer for layer in model.plan.layers if layer.rule == "sensitive"]
    assert wide
    assert all(layer.activation_quantizer is None for layer in wide)
    assert 0 < sum(products[layer.name] for layer in wide) <= 0.3
    narrow = [layer for layer in model.plan.layers if layer.activation_quantizer is not None]
    assert all(layer.sensitivity for layer in narrow)
    # what cannot change scores nothing: errors of INT4 weights are not measured
    plain = [layer for layer in model.plan.layers if layer not in wide and layer not in narrow]
    assert all(layer.sensitivity == 0 for layer in plain)


def test_lpips_is_a_target_of_its_own_weights(
    few_state: TrainingState, few_source: FloatPipeline, request_of: CalibrationRequest, tmp_path: Path
) -> None:
    asked = asking(request_of, psnr=None, lpips=0.5)
    with pytest.raises(InputError, match=r"a target of LPIPS needs its weights: pass --weights-dir"):
        search(asked, few_source, few_state)
    weights = open_weights(write_weights(tmp_path / "weights", LPIPS))
    _, reached = search(replace(asked, weights=weights), few_source, few_state)
    assert reached.relieved == ()
    assert 0 <= reached.statistics["lpips"]["median"] <= reached.statistics["lpips"]["worst"] < 0.5
    with pytest.raises(GateFailedError, match=r"target of LPIPS 1e-12 at the median cannot be reached"):
        search(replace(asking(asked, lpips=1e-12), weights=weights), few_source, few_state)


def test_a_target_ranks_the_plan_that_mixed_precision_left(
    base: BasePipeline, prompts: PromptSet, few_layers: Recipe, judged: PromptSet, tmp_path: Path
) -> None:
    mixed = {"sensitivity": "pictures", "prompts": 1, "top": 0.1, "bottom": 0, "sensitive": {"weights": "int8"}}
    data = few_layers.model_dump() | {"mixed": mixed, "target": TARGET | {"psnr": 1.0}}
    texts = PromptSet((*prompts.prompts, *judged.prompts))
    model = calibrate(base, recipe_from_data(data, "test"), texts, tmp_path / "model")
    wide = [layer for layer in model.plan.layers if layer.rule == "sensitive" and layer.activation_quantizer is None]
    assert all(layer.picture_error == 0 for layer in wide)  # nothing of them is ranked any more
    both = [layer for layer in model.plan.layers if layer.weights == "int4"]
    assert all(layer.picture_error and layer.sensitivity for layer in both)
    assert any(layer.picture_error != layer.sensitivity for layer in both)  # of two prompts, and of one
