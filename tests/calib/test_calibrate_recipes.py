"""Recipes of every kind go the whole way of calibrate: what is stored computes what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from s2p_deploy.calib import calibrate, dataset_name, fake_quant_denoiser
from s2p_deploy.calib.samples import take_paired_batch
from s2p_deploy.errors import InputError
from s2p_deploy.families import BasePipeline
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import CalibratedModel, LatentDataset, PromptSet, parent_folder
from s2p_deploy.records.precision_plan import read_plan, write_plan

QUICK: dict[str, Any] = {
    "sampling": {"steps": 6, "guidance_scale": 2.5},
    "dataset": {"prompts": 4, "samples_per_prompt": 3, "width": 2, "prompts_per_shard": 2},
    "scales": {"latents": 4},
}
TRAINED: dict[str, Any] = {"training": {"iterations": 2, "batch": 4}}
UNTRAINED: dict[str, Any] = {"training": {"iterations": 0}}
SLOW = pytest.mark.slow


def made(name: str, base: BasePipeline, prompts: PromptSet, out: Path, extra: dict[str, Any]) -> CalibratedModel:
    torch.set_num_threads(1)
    return calibrate(base, Recipe.load(name, QUICK | extra), prompts, out)


@torch.no_grad()
def stored_and_reloaded_errors(model: CalibratedModel) -> tuple[np.ndarray, np.ndarray]:
    """Per calibrated row: the error that training measured last, and that of the model as it is on disk.

    All samples are in one batch, as there: other batches round a few codes the other way.
    """
    dataset = LatentDataset.open(parent_folder(model.folder, model.manifest, "dataset"))
    training, count = model.manifest.content["training"], len(dataset.timestep_indices)
    batch = take_paired_batch(dataset, torch.tensor(training["timestep_indices"]), np.arange(count))
    output = fake_quant_denoiser(model)(batch.sample, batch.timestep_index, batch.texts, batch.added_cond)
    error = (output - batch.target).square().mean((1, 2, 3)).unflatten(0, (2, count)).mean(0)
    rows = torch.from_numpy(dataset.timestep_indices)
    found = np.array([float(error[rows == row].mean()) for row in training["timestep_indices"]])
    return np.array(training["errors_final"]), found


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("w4a8", TRAINED),
        ("w8a8", {}),
        ("modelopt-smoothquant", {}),
        pytest.param("modelopt", {"transforms": {"split_shortcut": "shortcut"}}, marks=SLOW),
        pytest.param("s2p-mixed", TRAINED | {"mixed": {"latents": 4}}, marks=SLOW),
        pytest.param("s2p", {"training": {"iterations": 2, "batch": 4, "adapter_rank": 4}}, marks=SLOW),
        pytest.param("s2p", {"training": {"iterations": 2, "features": {"targets": "blocks"}}}, marks=SLOW),
    ],
)
def test_the_model_on_disk_has_the_error_that_was_measured(
    name: str, extra: dict[str, Any], base: BasePipeline, prompts: PromptSet, tmp_path: Path
) -> None:
    model = made(name, base, prompts, tmp_path / "model", extra)
    measured, found = stored_and_reloaded_errors(model)
    np.testing.assert_allclose(found, measured, rtol=1e-5)
    assert model.research == ""


def test_a_plan_file_stands_in_place_of_the_rules(base: BasePipeline, prompts: PromptSet, tmp_path: Path) -> None:
    first = made("s2p", base, prompts, tmp_path / "first", UNTRAINED)
    edited = tmp_path / "plan.yaml"
    layer = next(layer for layer in first.plan.layers if layer.weights == "int4")
    write_plan(first.plan, edited)
    edited.write_text(edited.read_text().replace("weights: int4", "weights: int8", 1))
    recipe = Recipe.load("s2p", QUICK | UNTRAINED)
    second = calibrate(base, recipe, prompts, tmp_path / "second", plan=read_plan(edited))
    formats = {plan.name: plan.weights for plan in second.plan.layers}
    assert formats[layer.name] == "int8"
    assert second.plan.activation_quantizers == first.plan.activation_quantizers
    with pytest.raises(InputError, match=r"was made by another request \(it differs in plan\)"):
        calibrate(base, recipe, prompts, tmp_path / "second")


@pytest.mark.parametrize(
    ("mixed", "said"),
    [
        ({"products": 0.3}, r"has mixed\.products, and no ranking of the layers: set mixed\.sensitivity"),
        ({"insensitive": {"activations": "int4"}}, r"has mixed\.insensitive, and no ranking"),
        (
            {"products": 0.3, "sensitive": {"activations": "none"}},
            r"has mixed\.sensitive and mixed\.products, and no ranking",
        ),
        ({"products": 0.3, "sensitivity": "fisher"}, r"has mixed\.products, and no format for the layers"),
    ],
)
def test_mixed_precision_without_effect_is_refused(
    mixed: dict[str, Any], said: str, base: BasePipeline, prompts: PromptSet, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        calibrate(base, Recipe.load("w8a8", QUICK | {"mixed": mixed}), prompts, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_dataset_without_the_ends_of_the_schedule_is_named(
    base: BasePipeline, prompts: PromptSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    few = {"dataset": QUICK["dataset"] | {"prompts": 1, "samples_per_prompt": 1}}
    model = made("w8a8", base, prompts, tmp_path / "few", UNTRAINED | few)
    (said,) = caplog.messages
    assert said.startswith("the dataset has no sample near timestep ")
    missing = float(said.split("timestep ")[1].split(",")[0])
    first, last = model.timesteps.covered
    assert not first <= missing <= last
    caplog.clear()
    made("w8a8", base, prompts, tmp_path / "all", UNTRAINED | {"dataset": few["dataset"] | {"samples_per_prompt": 7}})
    assert caplog.messages == []


def test_going_on_from_a_finished_model(base: BasePipeline, prompts: PromptSet, tmp_path: Path) -> None:
    first = made("w4a8", base, prompts, tmp_path / "first", TRAINED)
    untouched = QUICK | UNTRAINED
    fewer = QUICK | {"sampling": {"steps": 3, "guidance_scale": 2.5}}
    same = calibrate(base, Recipe.load("w4a8", untouched), prompts, tmp_path / "same", initial=first)
    assert same.plan == first.plan
    assert same.transforms == first.transforms
    np.testing.assert_allclose(same.scales.scales, first.scales.scales, rtol=1e-6)
    weights = first.weights()
    assert all(np.array_equal(weights[name], value) for name, value in same.weights().items())
    tuned = calibrate(base, Recipe.load("w4a8", fewer | TRAINED), prompts, tmp_path / "tuned", initial=first)
    assert set(tuned.scales.calibrated) != set(first.scales.calibrated)
    assert not np.array_equal(tuned.scales.scales, first.scales.scales)
    with pytest.raises(InputError, match="initial model"):
        calibrate(base, Recipe.load("w4a8", untouched), prompts, tmp_path / "same")


def test_recipes_of_equal_sampling_share_a_dataset(base: BasePipeline, prompts: PromptSet, tmp_path: Path) -> None:
    recipes = [Recipe.load(name, QUICK | UNTRAINED) for name in ("s2p", "w8a8")]
    assert dataset_name(recipes[0]) == dataset_name(recipes[1])
    shared = tmp_path / "shared"
    models = [calibrate(base, recipe, prompts, tmp_path / recipe.name, dataset=shared) for recipe in recipes]
    assert {model.manifest.content["dataset"] for model in models} == {LatentDataset.open(shared).manifest.digest}


def test_a_dataset_of_another_request_is_refused(base: BasePipeline, prompts: PromptSet, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    calibrate(base, Recipe.load("w8a8", QUICK), prompts, tmp_path / "first", dataset=shared)
    other = Recipe.load("w8a8", QUICK | {"dataset": QUICK["dataset"] | {"prompts": 3}})
    assert dataset_name(other) != dataset_name(Recipe.load("w8a8", QUICK))
    with pytest.raises(InputError, match="shared"):
        calibrate(base, other, prompts, tmp_path / "second", dataset=shared)
    assert not (tmp_path / "second.partial").exists()


def test_too_few_prompts_to_select_by(base: BasePipeline, prompts: PromptSet, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"walks 4 prompts and selects by 9 others, of 6: give more prompts"):
        made("s2p", base, prompts, tmp_path / "model", {"training": {"iterations": 1, "selection": {"prompts": 9}}})
    assert not (tmp_path / "model.partial").exists()
