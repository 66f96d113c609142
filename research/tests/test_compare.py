"""Recipes side by side on the tiny pipeline: floating point, W8A8, and one that cannot work."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser

from research.tests.comparisons import HOSTILE
from s2p_deploy.calib import fake_quant_denoiser
from s2p_deploy.engines import TorchRunner
from s2p_deploy.errors import InputError
from s2p_deploy.families import BasePipeline, load_pipeline
from s2p_deploy.pipeline import EngineUNet, Schedule
from s2p_deploy.recipe import Recipe, checked_recipe
from s2p_deploy.records import CalibratedModel, Number, Prompt, PromptSet
from s2p_deploy.validation import picture_psnr
from s2p_research.compare import ComparisonConfig, compare
from s2p_research.comparison import Comparison, read_comparison
from s2p_research.recipe import ResearchRecipe
from tests.browser import foreign, watched_page
from tests.small_pipelines import tiny_base
from tests.validation.conftest import RECIPE
from tests.validation.test_report_page import elements

TRAIN = PromptSet(tuple(Prompt(f"t{number}", f"a word, and {number} more") for number in range(4)))
EXTRA = Prompt("hostile", HOSTILE)


def recipe_of(name: str, **changes: object) -> Recipe:
    return checked_recipe(RECIPE | {"name": name} | changes, "test", ResearchRecipe)


FLOAT = recipe_of("fp", weights="none", activations="none", rules=[])
BROKEN = recipe_of("broken", rules=[{"match": "no_such_layer", "weights": "int8"}])


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)  # another number of them rounds otherwise


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BasePipeline:
    return tiny_base(tmp_path_factory.mktemp("tiny") / "pipeline")


@pytest.fixture(scope="module")
def config(base: BasePipeline, prompts: PromptSet) -> ComparisonConfig:
    recipes = (BROKEN, FLOAT, recipe_of("w8a8"), recipe_of(HOSTILE, weights="int4"))
    return ComparisonConfig(base, recipes, TRAIN, prompts, (Schedule(3, "unipc"),), latent_prompts=2)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare") / "out"


@pytest.fixture(scope="module")
def found(config: ComparisonConfig, out: Path) -> Comparison:
    """What the first comparison wrote; later ones write to the same folder."""
    torch.set_num_threads(1)  # this runs before the fixture above
    compare(config, out, command="as typed")
    return read_comparison(out / "comparison.json")


def test_a_recipe_that_fails_is_reported_and_the_others_go_on(found: Comparison) -> None:
    assert [(recipe.name, recipe.error) for recipe in found.failed] == [("broken", "InputError")]
    assert "no_such_layer" in found.failed[0].message
    assert [recipe.name for recipe in found.results] == ["fp", "w8a8", HOSTILE]


def test_floating_point_comes_back_as_itself(found: Comparison) -> None:
    """The indexed denoiser through the table of time features against the stock pipeline."""
    plain = found.results[0]
    assert not plain.quantized
    assert [pictures.psnr.worst > 80 for pictures in plain.pictures] == [True, True]
    assert plain.sqnr.mean.value > 60  # what float16 answers leave
    assert plain.pictures[0].accuracy == found.floats[0].accuracy
    assert max(plain.pictures[0].step_error.high) < 1e-4


def test_fewer_bits_are_further_away(found: Comparison) -> None:
    plain, eight, four = found.results
    assert plain.sqnr.mean.value > eight.sqnr.mean.value > four.sqnr.mean.value > 0
    assert plain.weight_bits == plain.activation_bits == 16
    assert eight.weight_bits == 8 > four.weight_bits
    assert plain.size > eight.size > four.size
    for pictures in zip(*(recipe.pictures for recipe in found.results), strict=True):
        medians = [one.psnr.median.value for one in pictures]
        assert medians == sorted(medians, reverse=True)


def test_pictures_are_those_of_the_fake_quant_denoiser(
    found: Comparison, out: Path, base: BasePipeline, prompts: PromptSet
) -> None:
    calibrated = CalibratedModel.open(out / "recipes" / "w8a8" / "calib")
    pipe = load_pipeline(base)
    denoiser = EngineUNet(TorchRunner(fake_quant_denoiser(calibrated)), pipe.unet.config, calibrated.timesteps)
    psnr = picture_psnr(pipe, pipe.unet, denoiser, prompts, Schedule(5), 2.5)
    np.testing.assert_allclose(found.results[1].pictures[0].psnr_values, psnr, rtol=1e-4)
    assert found.results[1].pictures[0].psnr.median.value == pytest.approx(float(np.median(psnr)), rel=1e-4)


def test_every_call_and_row_is_there(found: Comparison) -> None:
    recipe = found.results[1]
    assert [len(pictures.step_error.median) for pictures in recipe.pictures] == [6, 3]  # PNDM: 5 steps are 6 calls
    assert recipe.sqnr.timestep_indices == (1, 201, 401, 601, 801)
    assert recipe.sqnr.mean.value == pytest.approx(np.mean(recipe.sqnr.db), rel=1e-4)
    assert recipe.sqnr.mean.n == found.latents == 2
    assert recipe.calibration_seconds is not None
    assert recipe.calibration_seconds > 0
    assert all(pictures.seconds > 0 for pictures in recipe.pictures)


def test_gains_are_against_the_first_recipe_that_quantizes(found: Comparison) -> None:
    plain, eight, four = found.results
    assert plain.gains == ()
    assert [gains.psnr.value for gains in eight.gains] == [0.0, 0.0]
    gains = four.gains[0]
    for metric in ("psnr", "ssim", "haarpsi"):
        mine, other = (getattr(recipe.pictures[0], f"{metric}_values") for recipe in (four, eight))
        assert getattr(gains, metric).value == pytest.approx(float(np.median(np.subtract(mine, other))), rel=1e-3)
    mine, other = (recipe.pictures[0].feature_distance for recipe in (four, eight))
    assert isinstance(mine, Number)
    assert isinstance(other, Number)
    assert gains.feature_distance is not None
    assert gains.feature_distance.value == pytest.approx(mine.value - other.value, rel=1e-3)
    assert isinstance(eight.gains[0].feature_distance, Number)
    assert eight.gains[0].feature_distance.low == eight.gains[0].feature_distance.high == 0.0


def test_the_yardstick_and_the_distance_have_their_numbers(found: Comparison) -> None:
    assert [drawn.label for drawn in found.floats] == ["own scheduler, 5 steps", "unipc, 3 steps"]
    assert all(drawn.pixel_shift["psnr"].n == 3 for drawn in found.floats)
    distances = [recipe.pictures[0].feature_distance for recipe in found.results]
    assert all(isinstance(distance, Number) and distance.low is not None for distance in distances)
    assert isinstance(distances[0], Number)
    assert distances[0].value == pytest.approx(0.0, abs=1e-3)


def test_a_second_start_makes_nothing_anew(config: ComparisonConfig, out: Path, found: Comparison) -> None:
    finished = [path.parent for path in out.rglob("manifest.json")]
    files = [path for folder in finished for path in folder.rglob("*")]
    before = {path: path.stat().st_mtime_ns for path in files}
    again = compare(config, out, command="as typed")
    assert len(finished) > 8
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert len(again.results) == 3
    assert read_comparison(out / "comparison.json").results == found.results


@pytest.mark.usefixtures("found")
def test_more_pictures_keep_the_calibration(config: ComparisonConfig, out: Path, prompts: PromptSet) -> None:
    stages: list[str] = []
    more = replace(config, recipes=config.recipes[1:3], held_out=PromptSet((*prompts.prompts, EXTRA)), schedules=())
    again = compare(more, out, progress=lambda stage, *_: stages.append(stage))
    assert again.results[1].pictures[0].psnr.median.n == 4
    assert set(stages) == {
        "pictures, FP, own-5",
        "fp: pictures, own-5",
        "fp: SQNR",
        "w8a8: pictures, own-5",
        "w8a8: SQNR",
    }


def test_prompts_that_are_no_captions_have_no_accuracy(config: ComparisonConfig, tmp_path: Path) -> None:
    found = compare(replace(config, recipes=(FLOAT,), held_out=PromptSet((EXTRA,)), schedules=()), tmp_path / "out")
    assert not isinstance(found.floats[0].accuracy, Number)
    assert not isinstance(found.results[0].pictures[0].feature_distance, Number)
    html = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    assert "alert" not in {name for _, attributes in elements(html) for name in attributes}
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html


@pytest.mark.usefixtures("found")
def test_the_page_shows_hostile_names_as_text_and_needs_no_network(out: Path, config: ComparisonConfig) -> None:
    compare(config, out, command=HOSTILE)
    html = (out / "comparison.html").read_text(encoding="utf-8")
    tags = elements(html)
    assert "script" not in {tag for tag, _ in tags}
    assert html.count("{{ 7 * 7 }}") > 3
    for tag, attributes in tags:
        assert tag not in {"link", "iframe", "object", "base"}
        assert attributes.get("src", "data:image/").startswith("data:image/")
    assert len([1 for tag, _ in tags if tag == "img"]) == 3 * 4  # prompts by FP and three recipes
    assert "broken</b> failed (InputError)" in html


@pytest.mark.slow
@pytest.mark.usefixtures("found")
def test_a_browser_shows_the_page_within_its_width(out: Path, browser: Browser) -> None:
    """On a phone's width nothing may stick out of the page."""
    with watched_page(browser, width=500) as opened:
        opened.page.goto((out / "comparison.html").as_uri())
        assert opened.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert opened.problems == []
    assert foreign(opened.requests) == []


@pytest.mark.usefixtures("found")
def test_pictures_are_kept_by_the_number_of_their_prompt(out: Path) -> None:
    folder = next((out / "recipes" / "w8a8").glob("result-*/pictures"))
    assert sorted(path.name for path in folder.iterdir())[:2] == ["00000.png", "00001.png"]
    assert np.asarray(Image.open(folder / "00000.png")).shape == (64, 64, 3)


@pytest.mark.usefixtures("found")
def test_a_hostile_name_names_no_folder(out: Path) -> None:
    names = sorted(path.name for path in (out / "recipes").iterdir())
    assert {"broken", "fp", "w8a8"} < set(names)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-") for name in names)


def test_force_makes_everything_anew(config: ComparisonConfig, tmp_path: Path) -> None:
    one = replace(config, recipes=(FLOAT,), schedules=(), latent_prompts=1)
    compare(one, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("manifest.json")}
    assert len(before) == 4  # the calibrated model, its result, the reference, the latents
    compare(one, tmp_path / "out", replace=True)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("manifest.json")}
    assert [path for path, when in before.items() if after.get(path) == when] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipes": (FLOAT, FLOAT)}, "two recipes are named 'fp'"),
        ({"recipes": (FLOAT, recipe_of("other", sampling={"steps": 7}))}, "'fp' and 'other' sample differently"),
        ({"held_out": TRAIN}, "is also a training prompt"),
        ({"schedules": (Schedule(3, "magic"),)}, "unknown scheduler 'magic'"),
    ],
)
def test_a_config_that_would_mislead_is_refused_before_it_starts(
    config: ComparisonConfig, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        compare(replace(config, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("found")
def test_another_recipe_of_the_same_name_is_a_failure_not_a_mixture(config: ComparisonConfig, out: Path) -> None:
    other = recipe_of("w8a8", dataset=RECIPE["dataset"] | {"prompts": 3})
    found = compare(replace(config, recipes=(other,), schedules=()), out)
    assert "it differs in recipe" in found.failed[0].message


@pytest.mark.usefixtures("found")
def test_json_is_strict(out: Path) -> None:
    data = json.loads((out / "comparison.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert data["kind"] == "Comparison"
