from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2p_deploy.api import as_prompts
from s2p_deploy.cli.options import overrides_from_settings
from s2p_deploy.cli.output import one_line
from s2p_deploy.errors import InputError
from s2p_deploy.recipe import Recipe

PATHS = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=3)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (None, {}),
        ([], {}),
        (["training.iterations=20"], {"training": {"iterations": 20}}),
        (["a.b=1", "a.c=null", "d= x y "], {"a": {"b": 1, "c": None}, "d": "x y"}),
        (["a=1", "a=2"], {"a": 2}),
        (["rules=[{match: 'x=y', weights: int8}]"], {"rules": [{"match": "x=y", "weights": "int8"}]}),
    ],
)
def test_settings(settings: list[str] | None, expected: dict[str, Any]) -> None:
    assert overrides_from_settings(settings) == expected


@given(PATHS, st.integers() | st.booleans() | st.none())
def test_a_setting_ends_where_its_path_says(path: list[str], value: object) -> None:
    text = json.dumps(value)
    found: Any = overrides_from_settings([f"{'.'.join(path)}={text}"])
    for part in path:
        found = found[part]
    assert found == value


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(InputError, match="contradicts"):
        overrides_from_settings(["a=1", "a.b=2"])


def test_settings_reach_the_recipe() -> None:
    recipe = Recipe.load("w4a8", overrides_from_settings(["training.iterations=20", "dataset.prompts=16"]))
    assert (recipe.training.iterations, recipe.dataset.prompts) == (20, 16)
    assert recipe.dataset.samples_per_prompt == Recipe.load("w4a8").dataset.samples_per_prompt


def test_bundled_prompts() -> None:
    train, held_out = as_prompts("shapes:train"), as_prompts("shapes:held_out")
    assert len(train.prompts) >= 128
    assert len(held_out.prompts) >= 64
    assert not {p.text for p in train.prompts} & {p.text for p in held_out.prompts}


def test_a_file_may_be_called_anything_else(tmp_path: Path) -> None:
    (tmp_path / "train").write_text("a red circle\n")
    assert [p.text for p in as_prompts(str(tmp_path / "train")).prompts] == ["a red circle"]


@given(st.text())
def test_a_message_is_one_printable_line(text: str) -> None:
    line = one_line(text)
    assert len(line.splitlines()) <= 1
    assert line.isprintable()
