"""research/results.md: what results_page.py makes of the committed comparisons, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from research.tests.comparisons import HOSTILE, comparison, failed, recipe
from s2p_research.comparison import write_record
from s2p_research.results_page import (
    page_with,
    read_comparisons,
    read_tables,
    reschedule_table,
    section,
    write_plots,
)

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "research" / "results.md"
PLACE = "# Results\n\nBy hand.\n\n<!-- begin rivals -->\nold\n<!-- end rivals -->\n\nMore by hand.\n"


def test_the_committed_page_is_what_the_script_makes() -> None:
    files = sorted((ROOT / "research" / "results").glob("*.json"))
    text = PAGE.read_text(encoding="utf-8")
    assert page_with(text, read_comparisons(files), read_tables(files)) == text


def test_the_plots_of_the_committed_page_are_there() -> None:
    links = re.findall(r"!\[[^]]*\]\((images/[^)]+)\)", PAGE.read_text(encoding="utf-8"))
    assert [link for link in links if not (PAGE.parent / link).is_file()] == []


def test_a_section_is_replaced_and_the_rest_is_kept() -> None:
    made = comparison(recipe("one", 40.0), recipe("two", 41.0, gain=1.0))
    page = page_with(PLACE, {"rivals": made})
    assert page.startswith("# Results\n\nBy hand.\n\n<!-- begin rivals -->\n")
    assert page.endswith("<!-- end rivals -->\n\nMore by hand.\n")
    assert "\nold\n" not in page
    assert page_with(page, {"rivals": made}) == page


def test_only_comparisons_are_read(tmp_path: Path) -> None:
    made = comparison(recipe("one", 40.0))
    write_record(made, tmp_path / "rivals.json")
    (tmp_path / "speed.json").write_text('{"seconds": 1}')
    assert read_comparisons(sorted(tmp_path.iterdir())) == {"rivals": made}


def test_schedules_are_columns_and_recipes_rows(tmp_path: Path) -> None:
    """By hand: fewer steps come later, fine-tuned behind as calibrated."""
    schedules = [("unipc", 10, False), ("own", 50, True), ("own", 50, False)]
    rows = [
        {"recipe": "a", "fine_tuned": tuned, "scheduler": scheduler, "steps": steps}
        | {"median_psnr": 40.04 + number, "low": 39.0, "high": 45.0}
        for number, (scheduler, steps, tuned) in enumerate(schedules)
    ]
    found = {"kind": "Reschedule", "pictures": 8, "iterations": 5, "rows": rows}
    (tmp_path / "b.json").write_text(json.dumps(found))
    expected = """
8 pictures, 5 iterations.

| recipe | PNDM 50, as calibrated | PNDM 50, fine-tuned | UniPC 10, as calibrated |
| --- | --- | --- | --- |
| `a` | 42.0 (39.0 to 45.0) | 41.0 (39.0 to 45.0) | 40.0 (39.0 to 45.0) |

"""
    assert reschedule_table(found) == expected
    assert read_tables([tmp_path / "b.json"]) == {"b": expected}


def test_a_new_section_comes_last() -> None:
    page = page_with("# Results\n", {"one": comparison(recipe("a", 40.0))})
    assert page.startswith("# Results\n\n## one\n\n<!-- begin one -->\n")
    assert page.endswith("<!-- end one -->\n")


@pytest.mark.parametrize("page", [PLACE, PLACE.replace("<!-- end rivals -->", "")])
def test_a_section_that_cannot_be_made_is_an_error(page: str) -> None:
    comparisons = {} if "end" in page else {"rivals": comparison()}
    with pytest.raises(SystemExit, match="rivals"):
        page_with(page, comparisons)


def test_a_table_has_values_intervals_and_the_best_in_bold() -> None:
    text = section(comparison(recipe("one", 40.0), recipe("two", 41.0, gain=1.0), failed("three")), "rivals")
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert "| 40.00 (39.0 to 41.0) |" in lines["one"]
    assert "| **41.00** (40.0 to 42.0) | 1.00 (0.5 to 1.5) |" in lines["two"]
    assert lines["three (failed: a rule matches no layer)"].replace(" ", "").endswith("|" * 12)
    assert len({line.count("|") for line in lines.values()}) == 1
    assert "    python -m s2p_research compare one two --out DIR" in text


def test_hostile_names_stay_text() -> None:
    text = section(comparison(recipe(HOSTILE, 40.0)), "rivals")
    assert "<script>" not in text
    row = next(line for line in text.splitlines() if "alert" in line)
    assert r"\| \*\*bold\*\* \`code\`" in row


def test_plots_are_files_that_stay_the_same(tmp_path: Path) -> None:
    made = comparison(recipe("one", 40.0), recipe("two", 41.0))
    for folder in ("first", "second"):
        write_plots(made, "rivals", tmp_path / folder)
    files = sorted((tmp_path / "first").iterdir())
    assert [file.name for file in files] == ["rivals-error.svg", "rivals-psnr.svg", "rivals-sqnr.svg"]
    for file in files:
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes()
        assert ">two</text>" in file.read_text(encoding="utf-8")
