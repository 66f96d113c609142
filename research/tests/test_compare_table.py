from __future__ import annotations

import math

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure

from research.tests.comparisons import HOSTILE, comparison, failed, recipe
from s2p_deploy.records import Number, Skipped
from s2p_deploy.validation.figures import svg
from s2p_research import comparison_page
from s2p_research.comparison_table import COLUMNS, SHORT, Cell, Table, cell_of, table_of


def column(table: Table, title: str) -> dict[str, Cell]:
    place = table.columns.index(title)
    return {row.name: row.cells[place] for row in table.rows}


def test_yardstick_and_floating_point_stand_above_the_recipes() -> None:
    table = table_of(comparison(recipe("one", 40.0), failed("two")))
    assert [(row.name, row.kind) for row in table.rows] == [
        ("one-pixel shift of FP", "yardstick"),
        ("floating point", "float"),
        ("one", "recipe"),
        ("two", "failed"),
    ]
    assert table.title == "own scheduler, 50 steps, 3 held-out prompts"
    psnr = column(table, "PSNR dB, median")
    assert psnr["one-pixel shift of FP"] == Cell("28.50", "27.0 to 30.0")
    assert psnr["floating point"] == Cell("–")
    assert column(table, "attributes right")["floating point"] == Cell("0.9900")
    assert column(table, "MB")["floating point"] == Cell("7.00")
    assert column(table, "worst")["one"] == Cell("37.00")
    assert table.rows[3].note == "failed: a rule matches no layer"
    assert all(len(row.cells) == len(table.columns) for row in table.rows)
    assert list(table.columns) == [column.title for column in COLUMNS if not column.paired]


def test_the_best_of_a_column_is_marked_in_the_right_direction() -> None:
    table = table_of(comparison(recipe("one", 40.0), recipe("two", 41.0)))
    best = {title: {name for name, cell in column(table, title).items() if cell.best} for title in table.columns}
    assert best["PSNR dB, median"] == best["SSIM"] == best["SQNR dB"] == best["FID-to-FP*"] == {"two"}
    assert best["MB"] == best["attributes right"] == best["gain dB"] == set()  # equal, or nothing to compare
    assert best["W bits"] == best["s per picture"] == set()  # no rank


def test_what_quantizes_nothing_is_not_the_best() -> None:
    table = table_of(comparison(recipe("fp", 100.0, bits=16.0), recipe("one", 40.0), recipe("two", math.nan)))
    psnr = column(table, "PSNR dB, median")
    assert not any(cell.best for cell in psnr.values())  # one recipe is left to compare
    assert psnr["two"].text == "not a number"
    table = table_of(comparison(recipe("fp", 100.0, bits=16.0), recipe("one", 40.0), recipe("two", 39.0)))
    assert [name for name, cell in column(table, "PSNR dB, median").items() if cell.best] == ["one"]


def test_another_schedule_has_no_column_that_no_schedule_changes() -> None:
    made = comparison(recipe("one", 40.0, schedules=2, gain=0.25), schedules=2)
    table = table_of(made, 1, SHORT)
    assert table.title.startswith("unipc, 10 steps")
    assert not {"W bits", "A bits", "MB", "SQNR dB"} & set(table.columns)
    assert set(table.columns) < set(SHORT)
    assert column(table, "gain dB")["one"] == Cell("0.25", "-0.2 to 0.8")


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        (None, Cell("–")),
        (Skipped("no captions"), Cell("–", "no captions")),
        (1.25, Cell("1.250")),
        (Number(1.25, 4), Cell("1.250")),
        (Number(1.25, 4, 1.0, 1.5), Cell("1.250", "1.00 to 1.50")),
        (math.inf, Cell("not a number")),
    ],
)
def test_a_value_in_words(value: Number | Skipped | float | None, cell: Cell) -> None:
    assert cell_of(value, 3) == cell


NAMES = (HOSTILE, "_hidden", "$", "line\nbreak\0", "x" * 200)


@pytest.mark.parametrize("draw", [comparison_page.sqnr_lines, comparison_page.error_lines, comparison_page.psnr_bars])
def test_figures_show_every_name_as_text(draw: comparison_page.DrawOf) -> None:
    made = comparison(*(recipe(name, 40.0 + number) for number, name in enumerate(NAMES)))
    text = svg("figure", draw(made))
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "_hidden" in text
    assert "x" * 41 not in text


def test_every_recipe_has_a_line_but_the_one_in_floating_point() -> None:
    made = comparison(recipe("fp", 100.0, bits=16.0), *(recipe(f"r{number}", 40.0) for number in range(12)))
    with mpl.rc_context():
        axes = Figure().add_subplot()
        comparison_page.sqnr_lines(made)(axes)
    looks = [(line.get_color(), line.get_linestyle()) for line in axes.lines]
    assert len(looks) == len(set(looks)) == 12
    assert list(axes.lines[0].get_ydata()) == [20.0, 30.0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [f"r{number}" for number in range(12)]
