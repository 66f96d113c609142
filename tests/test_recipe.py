from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from s2p_deploy.errors import InputError
from s2p_deploy.recipe import Recipe, load_recipe, preset_names, recipe_from_data

PRESETS = {"fp", "ptq", "ptq-stream", "w4a8", "w8a8"}
RIVALS = {
    "bitsfusion",
    "collapse",
    "efficientdm",
    "max",
    "modelopt",
    "modelopt-smoothquant",
    "pcr",
    "ptq4dm",
    "q-diffusion",
    "svdquant",
}
ABLATIONS = {
    "asymmetric",
    "asymmetric-trained",
    "blocks",
    "freeze-layers",
    "freeze-oscillation",
    "guided-loss",
    "no-training",
    "one-scale",
    "s2p",
    "s2p-mixed",
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
SMALL: dict[str, Any] = {
    "name": "small",
    "weights": "int8",
    "activations": "none",
    "dataset": {"prompts": 1, "points_per_prompt": 1},
    "training": {"iterations": 0},
}


def test_every_preset_loads_under_its_own_name() -> None:
    shipped = PRESETS | RIVALS | ABLATIONS | {"w8a8-peaks"}
    assert preset_names() == sorted(shipped)  # no name twice, in any two folders
    assert [load_recipe(name).name for name in preset_names()] == preset_names()


def test_what_the_presets_say() -> None:
    formats = {name: (load_recipe(name).weights, load_recipe(name).activations) for name in sorted(PRESETS)}
    assert formats == {
        "fp": ("none", "none"),
        "ptq": ("int8", "int8"),
        "ptq-stream": ("int8", "int8"),
        "w4a8": ("int4", "int8"),
        "w8a8": ("int8", "int8"),
    }
    assert [name for name in preset_names() if load_recipe(name).is_float] == ["fp"]
    kept = {rule.match: (rule.weights, rule.activations) for rule in load_recipe("w4a8").rules}
    assert kept == {"input": ("int8", "none"), "output": ("int8", "none"), "text": (None, "none")}


def test_only_ptq_stream_looks_at_no_activation() -> None:
    assert [name for name in preset_names() if not load_recipe(name).scales.measured] == ["ptq-stream"]
    assert changed_keys(load_recipe("ptq-stream"), load_recipe("ptq")) == {"scales"}


def changed_keys(recipe: Recipe, other: Recipe) -> set[str]:
    """Top-level keys in which two recipes differ, without their names."""
    return {key for key, value in recipe if key != "name" and value != getattr(other, key)}


def test_rivals_and_ablations_are_s2p_but_for_what_they_compare() -> None:
    base = load_recipe("s2p")
    assert changed_keys(base, load_recipe("w4a8")) == {"transforms"}
    allowed = {"transforms", "scales", "training", "mixed"}
    changes = {name: changed_keys(load_recipe(name), base) for name in (RIVALS | ABLATIONS) - {"s2p"}}
    assert changes.pop("bitsfusion") == {"activations", "mixed", "training"}
    assert changes.pop("ptq4dm") == {"dataset", "scales", "training"}
    assert {name for name, keys in changes.items() if not keys or keys - allowed} == set()


def test_rivals_that_train_nothing() -> None:
    trained = {name for name in RIVALS if load_recipe(name).training.iterations > 0}
    assert trained == {"efficientdm", "bitsfusion"}
    assert {load_recipe(name).training.iterations for name in trained} == {load_recipe("w4a8").training.iterations}


@pytest.mark.parametrize("name", sorted(RIVALS - {"bitsfusion"}))
def test_one_override_gives_a_rival_of_int8_weights(name: str) -> None:
    changed = load_recipe(name, {"weights": "int8"})
    assert changed_keys(changed, load_recipe(name)) == {"weights"}
    assert {rule.weights for rule in changed.rules} == {"int8", None}


def test_what_exists_in_simulation_only() -> None:
    simulated = {name for name in preset_names() if load_recipe(name).simulation_only}
    assert simulated == {"asymmetric", "asymmetric-trained", "pcr"}


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
        ({"weights": "int3"}, "weights: input should be 'int8', 'int4', 'levels3', 'levels5', 'levels9' or 'none'"),
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
    with pytest.raises(InputError, match=r"unknown recipe 'w2a2': use one of asymmetric, .*, w8a8-peaks, or the path"):
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


def test_a_recipe_extends_another(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: pcr\nname: mine\nscales: {relaxed: 0.5}\n")
    mine, pcr = load_recipe(str(path)), load_recipe("pcr")
    assert mine.scales == pcr.scales.model_copy(update={"relaxed": 0.5})
    assert changed_keys(mine, pcr) == {"scales"}


def test_a_recipe_extends_only_what_ships(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    for text, parent in (("extends: mine\nname: mine\n", "mine"), ("extends: w4a8\nname: w4a8\n", "w4a8")):
        path.write_text(text)
        with pytest.raises(InputError, match=f"extends: '{parent}' is no other recipe of"):
            load_recipe(str(path))
