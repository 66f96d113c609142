from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from s2p_deploy.errors import InputError
from s2p_deploy.recipe import Recipe, load_recipe, preset_names, recipe_from_data

SMALL: dict[str, Any] = {
    "name": "small",
    "weights": "int8",
    "activations": "none",
    "dataset": {"prompts": 1, "points_per_prompt": 1},
    "training": {"iterations": 0},
}


def test_every_preset_loads_under_its_own_name() -> None:
    assert preset_names() == ["fp", "w4a8", "w8a8"]
    assert [load_recipe(name).name for name in preset_names()] == preset_names()


def test_what_the_presets_say() -> None:
    formats = {name: (load_recipe(name).weights, load_recipe(name).activations) for name in preset_names()}
    assert formats == {"fp": ("none", "none"), "w4a8": ("int4", "int8"), "w8a8": ("int8", "int8")}
    assert [name for name in preset_names() if load_recipe(name).is_float] == ["fp"]
    kept = {rule.match: (rule.weights, rule.activations) for rule in load_recipe("w4a8").rules}
    assert kept == {"conv_in": ("int8", "none"), "conv_out": ("int8", "none"), "text": (None, "none")}


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    assert load_recipe(str(path)) == recipe_from_data(SMALL, "here")


def test_overrides_change_what_they_name_and_nothing_else() -> None:
    plain, changed = load_recipe("w4a8"), load_recipe("w4a8", {"training": {"iterations": 7}})
    assert changed.training.iterations == 7
    assert changed.model_copy(update={"training": plain.training}) == plain
    assert changed.digest() != plain.digest()


def test_a_resolved_recipe_reads_back_to_the_same_digest() -> None:
    for name in preset_names():
        recipe = load_recipe(name)
        assert recipe_from_data(recipe.model_dump(mode="json"), "stored").digest() == recipe.digest()


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_recipe("fp").name = "x"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "colour: extra inputs are not permitted"),
        ({"training": {"iteration": 1}}, "training.iteration: extra inputs"),
        ({"training": {"iterations": -1}}, "training.iterations: input should be greater"),
        ({"training": {"iterations": "many"}}, "training.iterations: input should be a valid integer"),
        ({"weights": "int3"}, "weights: input should be 'int8', 'int4' or 'none'"),
        ({"rules": [{"match": "x", "weight": "int8"}]}, "rules.0.weight: extra inputs"),
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
        load_recipe("w4a8", change)
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(InputError, match="unknown recipe 'w2a2': use one of fp, w4a8, w8a8"):
        load_recipe("w2a2")


@pytest.mark.parametrize(
    ("data", "message"), [(b"a: [", "not valid YAML"), (b"- 1", "mapping"), (b"", "mapping"), (b"\xff", "UTF-8")]
)
def test_a_file_that_is_no_recipe(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        load_recipe(str(path))
    assert "\n" not in str(caught.value)


def test_nothing_in_a_recipe_is_executed(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    path = tmp_path / "r.yaml"
    path.write_text(f"name: !!python/object/apply:os.mkdir ['{mark}']")
    with pytest.raises(InputError):
        load_recipe(str(path))
    assert not mark.exists()


def test_defaults_are_those_of_the_paper_and_the_demo() -> None:
    recipe: Recipe = recipe_from_data(SMALL, "here")
    assert (recipe.sampling.steps, recipe.sampling.guidance_scale) == (50, None)
    assert recipe.validation.gates.block_sqnr == 50.0
