from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from s2p_deploy.errors import InputError
from s2p_deploy.recipe import Recipe, preset_names, recipe_from_data

PRESETS = {"fp", "ptq", "ptq-stream", "w4a8", "w8a8"}
OTHERS = {"modelopt", "modelopt-smoothquant", "s2p", "s2p-mixed"}  # the paper's own, and nvidia-modelopt's scales
SMALL: dict[str, Any] = {
    "name": "small",
    "weights": "int8",
    "activations": "none",
    "dataset": {"prompts": 1, "samples_per_prompt": 1},
    "training": {"iterations": 0},
}


def test_every_preset_loads_under_its_own_name() -> None:
    assert preset_names() == sorted(PRESETS | OTHERS)
    assert [Recipe.load(name).name for name in preset_names()] == preset_names()


def test_what_the_presets_say() -> None:
    formats = {name: (Recipe.load(name).weights, Recipe.load(name).activations) for name in sorted(PRESETS)}
    assert formats == {
        "fp": ("none", "none"),
        "ptq": ("int8", "int8"),
        "ptq-stream": ("int8", "int8"),
        "w4a8": ("int4", "int8"),
        "w8a8": ("int8", "int8"),
    }
    assert [name for name in preset_names() if Recipe.load(name).is_float] == ["fp"]
    kept = {rule.match: (rule.weights, rule.activations) for rule in Recipe.load("w4a8").rules}
    assert kept == {"input": ("int8", "none"), "output": ("int8", "none"), "text": (None, "none")}


def test_only_ptq_stream_looks_at_no_activation() -> None:
    assert [name for name in preset_names() if not Recipe.load(name).scales.measured] == ["ptq-stream"]
    assert changed_keys(Recipe.load("ptq-stream"), Recipe.load("ptq")) == {"scales"}


def changed_keys(recipe: Recipe, other: Recipe) -> set[str]:
    """Top-level keys in which two recipes differ, without their names."""
    return {key for key, value in recipe if key != "name" and value != getattr(other, key)}


def test_the_papers_recipes_and_modelopts_are_w4a8_but_for_what_they_say() -> None:
    base = Recipe.load("s2p")
    assert changed_keys(base, Recipe.load("w4a8")) == {"transforms", "scales", "training"}
    changes = {name: changed_keys(Recipe.load(name), base) for name in OTHERS - {"s2p"}}
    assert changes == {
        "modelopt": {"scales", "training"},
        "modelopt-smoothquant": {"scales", "training"},
        "s2p-mixed": {"mixed"},
    }


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    assert Recipe.load(str(path)) == recipe_from_data(SMALL, "here")


def test_overrides_change_what_they_name_and_nothing_else() -> None:
    plain, changed = Recipe.load("w4a8"), Recipe.load("w4a8", {"training": {"iterations": 7}})
    assert changed.training.iterations == 7
    assert changed.model_copy(update={"training": plain.training}) == plain
    assert changed.digest() != plain.digest()


def test_a_resolved_recipe_reads_back_to_the_same_digest() -> None:
    for name in preset_names():
        recipe = Recipe.load(name)
        assert recipe_from_data(recipe.model_dump(mode="json"), "stored").digest() == recipe.digest()


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe.load("fp").name = "x"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "colour: there is no such key"),
        ({"training": {"save_every": 1}}, "training.save_every: there is no such key; use save_minutes"),
        ({"training": {"iteration": 1}}, "training.iteration: there is no such key"),
        ({"training": {"iterations": -1}}, "training.iterations: input should be greater"),
        ({"training": {"iterations": "many"}}, "training.iterations: input should be a valid integer"),
        ({"weights": "int3"}, "weights: input should be 'int8', 'int4' or 'none'"),
        ({"rules": [{"match": "x", "weight": "int8"}]}, "rules.0.weight: there is no such key"),
        (
            {"validation": {"gates": {"block_sqnr": float("nan")}}},
            "validation.gates.block_sqnr: input should be a finite",
        ),
        ({"dataset": {"prompts": 0}}, "dataset.prompts: input should be greater"),
        ({"dataset": 3}, "dataset: input should be"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Recipe.load("w4a8", change)
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"unknown recipe 'w2a2': use one of fp, .*, w8a8, or the path"):
        Recipe.load("w2a2")


@pytest.mark.parametrize(
    ("data", "message"), [(b"a: [", "not valid YAML"), (b"- 1", "mapping"), (b"", "mapping"), (b"\xff", "UTF-8")]
)
def test_a_file_that_is_no_recipe(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        Recipe.load(str(path))
    assert "\n" not in str(caught.value)


def test_nothing_in_a_recipe_is_executed(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    path = tmp_path / "r.yaml"
    path.write_text(f"name: !!python/object/apply:os.mkdir ['{mark}']")
    with pytest.raises(InputError):
        Recipe.load(str(path))
    assert not mark.exists()


def test_defaults_are_those_of_the_paper_and_the_demo() -> None:
    recipe: Recipe = recipe_from_data(SMALL, "here")
    assert (recipe.sampling.steps, recipe.sampling.guidance_scale) == (50, None)
    assert recipe.validation.gates.block_sqnr == 50.0


def test_a_recipe_extends_another(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: w8a8\nname: mine\nscales: {latents: 5}\n")
    mine, w8a8 = Recipe.load(str(path)), Recipe.load("w8a8")
    assert mine.scales == w8a8.scales.model_copy(update={"latents": 5})
    assert changed_keys(mine, w8a8) == {"scales"}


def test_a_recipe_extends_only_what_ships(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    for text, parent in (("extends: mine\nname: mine\n", "mine"), ("extends: w4a8\nname: w4a8\n", "w4a8")):
        path.write_text(text)
        with pytest.raises(InputError, match=f"extends: '{parent}' is no other recipe of"):
            Recipe.load(str(path))
