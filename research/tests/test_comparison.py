from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from research.tests.comparisons import comparison, failed, recipe
from s2p_deploy.errors import InputError
from s2p_deploy.records import Number, Skipped
from s2p_research.comparison import read_comparison, read_recipe_figures, write_record


def test_a_comparison_reads_back_as_it_was_written(tmp_path: Path) -> None:
    made = comparison(recipe("first", 40.0), failed("second"), recipe("third", 41.5))
    write_record(made, tmp_path / "comparison.json")
    assert read_comparison(tmp_path / "comparison.json") == made
    assert [one.name for one in made.results] == ["first", "third"]
    assert [one.name for one in made.failed] == ["second"]


def test_numbers_are_written_to_six_digits(tmp_path: Path) -> None:
    write_record(recipe("one", 40.123456789), tmp_path / "figures.json")
    assert read_recipe_figures(tmp_path / "figures.json").pictures[0].psnr.median.value == 40.1235


def test_what_is_no_number_survives_as_json(tmp_path: Path) -> None:
    broken = recipe("diverged", math.nan)
    write_record(broken, tmp_path / "figures.json")
    json.loads((tmp_path / "figures.json").read_text(), parse_constant=pytest.fail)
    found = read_recipe_figures(tmp_path / "figures.json").pictures[0]
    assert math.isnan(found.psnr.median.value)
    assert all(math.isnan(value) for value in found.psnr_values)


def test_a_number_and_its_absence_are_told_apart(tmp_path: Path) -> None:
    made = recipe("one", 40.0)
    changes = {"accuracy": Skipped("no captions"), "feature_distance": Number(1.0, 2)}
    pictures = made.pictures[0].model_copy(update=changes)
    write_record(made.model_copy(update={"pictures": (pictures,)}), tmp_path / "figures.json")
    found = read_recipe_figures(tmp_path / "figures.json").pictures[0]
    assert found.accuracy == Skipped("no captions")
    assert found.feature_distance == Number(1.0, 2)


@pytest.mark.parametrize("spoil", ["not json", "[]", "{}"])
def test_another_file_is_refused(tmp_path: Path, spoil: str) -> None:
    (tmp_path / "other.json").write_text(spoil)
    with pytest.raises(InputError, match=r"other\.json is no Comparison of this version"):
        read_comparison(tmp_path / "other.json")


@pytest.mark.parametrize("change", [{"schema_version": 2}, {"more": 1}])
def test_another_schema_is_refused(tmp_path: Path, change: dict[str, int]) -> None:
    file = tmp_path / "comparison.json"
    write_record(comparison(recipe("one", 40.0)), file)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match="is no Comparison of this version"):
        read_comparison(file)
