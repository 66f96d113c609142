"""The public API: what is in it, the forms its arguments may have, and a pipeline that exists in memory only."""

from __future__ import annotations

import ast
import doctest
import inspect
import runpy
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import s2p_deploy
from s2p_deploy import api
from s2p_deploy.cli import main
from s2p_deploy.errors import InputError, IntegrityError, S2PError
from s2p_deploy.families import load_pipeline, resolve_base
from s2p_deploy.families.pipelines import save_pipeline
from s2p_deploy.recipe import Recipe
from s2p_deploy.records import PromptSet, read_prompts
from tests.cli.commands import quick_settings
from tests.random_loras import in_peft, random_layers, write_lora

PUBLIC = [getattr(s2p_deploy, name) for name in s2p_deploy.__all__]
VERBS = [one for one in PUBLIC if inspect.isfunction(one)]
CLASSES = [one for one in PUBLIC if inspect.isclass(one)]


def test_every_public_name_is_there_and_known_to_type_checkers() -> None:
    tree = ast.parse(Path(s2p_deploy.__file__).read_text(encoding="utf-8"))
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    imported = [name.name for node in checked.body if isinstance(node, ast.ImportFrom) for name in node.names]
    assert sorted(imported) == sorted(s2p_deploy.__all__)
    assert {name for name in s2p_deploy.__all__ if not hasattr(s2p_deploy, name)} == set()
    assert set(s2p_deploy.__all__) <= set(dir(s2p_deploy))


def test_every_error_is_public() -> None:
    defined = (S2PError, *S2PError.__subclasses__())
    errors = {error.__name__ for error in defined if error.__module__ == "s2p_deploy.errors"}
    assert errors <= set(s2p_deploy.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = s2p_deploy.nonsense  # type: ignore[attr-defined]


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.__name__)
def test_every_public_function_has_an_example_and_describes_its_arguments(verb: object) -> None:
    text = inspect.getdoc(verb) or ""
    assert ">>> " in text
    assert [name for name in inspect.signature(verb).parameters if f"\n    {name}: " not in text] == []  # type: ignore[arg-type]


def has_example(public: object) -> bool:
    return ">>> " in (inspect.getdoc(public) or "")


def test_every_public_class_has_an_example() -> None:
    """Of the errors, their base has it: the others are raised and never made by a user."""
    errors = [one for one in CLASSES if issubclass(one, S2PError) and one is not S2PError]
    assert [one.__name__ for one in CLASSES if one not in errors and not has_example(one)] == []


@pytest.mark.slow
def test_the_examples_work_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = ["calibrate", "export_graph", "build_engine", "validate", "open_pipeline", "save_engine_pipeline"]
    names = first + [one.__name__ for one in (*VERBS, *CLASSES) if one.__name__ not in first]
    public = {name: getattr(s2p_deploy, name) for name in s2p_deploy.__all__} | {"np": np, "Path": Path}
    runner = doctest.DocTestRunner()
    for name in names:
        if name == "adapt":
            layers = random_layers(resolve_base("shapes"), {"unet": ["mid_block.resnets.0.conv1"]})
            write_lora(Path("ink.safetensors"), in_peft(layers))
        if name == "join_engines":
            for command in (
                ["calibrate", "shapes", "--recipe", "fp", "--out", "build/fp-calib"],
                ["export", "build/fp-calib", "--out", "build/fp-graph"],
                ["build", "build/fp-graph", "--backend", "onnxruntime", "--out", "build/fp-engine"],
            ):
                assert main(command) == 0
        if name == "ComponentEngines":
            assert main(["components", "shapes", "--backend", "onnxruntime", "--out", "build/components"]) == 0
        if name == "LatentDataset":
            small = quick_settings("sampling.steps=2", "dataset.samples_per_prompt=2")
            options = ["--recipe", "w8a8", "--prompts", "shapes:train", "--out", "build/dataset"]
            assert main(["dataset", "shapes", *options, *small]) == 0
        for test in doctest.DocTestFinder().find(public[name], name, globs=public):
            assert runner.run(test).failed == 0, test.name


@pytest.mark.slow
def test_the_worked_example_goes_from_memory_to_a_picture(tmp_path: Path) -> None:
    file = Path(__file__).resolve().parents[1] / "examples" / "python_api.py"
    worked_example = runpy.run_path(str(file))["main"]
    worked_example(tmp_path)
    picture = np.asarray(Image.open(tmp_path / "picture.png"))
    assert picture.shape == (64, 64, 3)
    assert picture.std() > 10
    (saved,) = tmp_path.glob("pipeline-*")
    assert s2p_deploy.Engine.open(tmp_path / "engine").manifest.base.source == str(saved)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("manifest.json")}
    with pytest.raises(InputError, match="graph exists"):
        worked_example(tmp_path)  # the calibration is found again, with its pipeline
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("manifest.json")} == before


def test_prompts_in_every_form(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\na blue square\n", encoding="utf-8")
    given = read_prompts(file)
    assert api.as_prompts(file) == api.as_prompts(str(file)) == api.as_prompts(given) == given
    assert api.as_prompts(["a red circle", " a blue square", "a red circle"]) == given
    assert isinstance(api.as_prompts("shapes:train"), PromptSet)


@pytest.mark.parametrize("texts", [[], [""], ["x", " "], [3]])
def test_texts_that_are_no_prompts(texts: list[str]) -> None:
    with pytest.raises(InputError, match="at least one text"):
        api.as_prompts(texts)


def test_a_recipe_in_every_form(tmp_path: Path) -> None:
    recipe = Recipe.load("w4a8")
    file = tmp_path / "mine.yaml"
    file.write_text("extends: w4a8\nname: mine\n", encoding="utf-8")
    assert api.as_recipe("w4a8") == api.as_recipe(recipe) == api.as_recipe(recipe.model_dump()) == recipe
    assert api.as_recipe(file) == api.as_recipe({"extends": "w4a8", "name": "mine"})
    assert api.as_recipe(file).training == recipe.training
    with pytest.raises(InputError, match="nonsense"):
        api.as_recipe(recipe.model_dump() | {"nonsense": 1})


@pytest.fixture(scope="module")
def pipe() -> diffusers.DiffusionPipeline:
    return load_pipeline(resolve_base("shapes"))


def test_a_pipeline_in_memory_is_saved_once(pipe: diffusers.DiffusionPipeline, tmp_path: Path) -> None:
    saved = api.as_base(pipe, tmp_path)
    assert saved.folder.parent == tmp_path
    assert saved.folder.name == f"pipeline-{saved.base.digest[:16]}"
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert api.as_base(pipe, tmp_path) == saved
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == written
    again = load_pipeline(saved).components["unet"].state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in pipe.components["unet"].state_dict().items())


def test_a_saved_pipeline_that_was_changed_is_refused(pipe: diffusers.DiffusionPipeline, tmp_path: Path) -> None:
    saved = save_pipeline(pipe, tmp_path)
    config = saved.folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text(encoding="utf-8") + " ", encoding="utf-8")
    with pytest.raises(IntegrityError, match="was changed since the pipeline was saved"):
        save_pipeline(pipe, tmp_path)


def test_what_is_no_supported_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a Linear is not supported: give a StableDiffusion3InpaintPipeline or"):
        api.as_base(torch.nn.Linear(1, 1), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_pipeline_with_adapters_is_refused(
    pipe: diffusers.DiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe.components["unet"], "peft_config", {"mine": None}, raising=False)
    with pytest.raises(InputError, match="the unet of this pipeline has adapters"):
        save_pipeline(pipe, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora_layers": ["convolutions"]}, "--lora-layers go with --lora-rank"),
        ({"lora_layers": ["convolutions"], "lora_for": ["ink.safetensors"]}, "without --lora-for"),
        ({"image_adapters": 2}, "--image-adapters go with --image-tokens"),
    ],
)
def test_options_of_adapters_that_would_do_nothing_are_refused(
    options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        api.export_graph(tmp_path / "calib", out=tmp_path / "graph", **options)
